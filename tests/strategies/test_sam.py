"""SAM descends the gradient of the worst point near the weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import registered
from nets import BATCH, KINDS, Workload, X, Y, dense, functional, one_weight, sgd, weight_of
from runs import assert_same, differs, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3
from trainstep.replicas import assign


def stepped(initial: float = 1.0, **options) -> float:
    """Return w after a step of SGD(0.1) on the loss w^2, whose gradient is 2 w."""
    model = trainstep.apply(one_weight(initial), "sam", **options)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    return weight_of(model)


def test_one_weight_by_hand():
    # Up by rho along the gradient, which is positive: 2 * (1 + 0.5) = 3 is descended, from 1.
    assert stepped(rho=0.5) == pytest.approx(1 - 0.1 * 3, rel=1e-6)
    assert stepped(-1.0, rho=0.5) == pytest.approx(-1 + 0.1 * 3, rel=1e-6)


def test_adaptive_by_hand():
    # T = |w| + eta = 2.5, g = 4: e = rho T^2 g / |T g| = 0.1 * 2.5 = 0.25; 2 * 2.25 = 4.5 is descended, from 2.
    assert stepped(2.0, rho=0.1, adaptive=True, eta=0.5) == pytest.approx(2 - 0.1 * 4.5, rel=1e-6)


def test_it_ascends_in_the_first_of_so_many_steps():
    model = trainstep.apply(one_weight(1.0), "sam", rho=0.5, interval=3)
    model.compile(sgd(0.1), "mse")
    weights = [1.0]
    for _ in range(4):
        model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
        weights.append(weight_of(model))
    # w - 0.2 (w + 0.5), then twice w - 0.2 w, then again the first.
    expected = [1.0]
    for ascends in (1, 0, 0, 1):
        expected.append(expected[-1] - 0.2 * (expected[-1] + 0.5 * ascends))
    assert weights == pytest.approx(expected, rel=1e-6)


def loop(rho: float, adaptive: bool) -> list[np.ndarray]:
    """Return the weights that equation 2 of the paper, written down with a GradientTape, leaves."""
    keras.utils.set_random_seed(0)
    model = dense()

    def gradients(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]

    for start in range(0, len(X), BATCH):
        x, y = X[start : start + BATCH], Y[start : start + BATCH]
        weights = model.get_weights()
        sizes = [np.abs(w) + 0.01 if adaptive else np.ones_like(w) for w in weights]
        scaled = [g * size for g, size in zip(gradients(x, y), sizes, strict=True)]
        norm = np.sqrt(sum(np.square(g).sum() for g in scaled))
        model.set_weights([w + rho * size * g / norm for w, size, g in zip(weights, sizes, scaled, strict=True)])
        descended = gradients(x, y)
        model.set_weights([w - 0.1 * g for w, g in zip(weights, descended, strict=True)])
    return model.get_weights()


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_an_own_loop_with_the_formula(adaptive, assert_close):
    ours = run(Workload(dense, X, Y), "sam", {"rho": 0.2, "adaptive": adaptive}, fit={"epochs": 1})
    assert_close(ours.variables, loop(0.2, adaptive))


def test_statistics_and_metrics_are_those_of_the_first_evaluation():
    """At a learning rate of zero the weights stay, and with them everything else is as in plain training."""
    workload = Workload(functional, X, Y, lambda: {"optimizer": sgd(0.0), "loss": "mse", "metrics": ["mae"]})
    ours, plain = run(workload, "sam", {"rho": 0.5}), run(workload)
    if KERAS_3:  # Where the second evaluation takes the masks of the first, and leaves their state alone.
        assert_same(ours, plain)
    else:
        assert not differs(ours._replace(variables=ours.variables[:4]), plain._replace(variables=plain.variables[:4]))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_back_to_the_bit_after_the_ascent(kind):
    workload = KINDS[kind]
    model = trainstep.apply(workload.build(), "sam", rho=3.0)
    model.compile(**{**workload.compile(), "optimizer": sgd(0.0)})
    model.fit(workload.x, workload.y, batch_size=BATCH, epochs=1, verbose=0)
    before = [w.numpy() for w in model.trainable_variables]
    model.fit(workload.x, workload.y, batch_size=BATCH, epochs=1, verbose=0)
    tf.nest.map_structure(np.testing.assert_array_equal, [w.numpy() for w in model.trainable_variables], before)


def test_what_another_strategy_draws_is_the_same_in_both_evaluations_and_counted_once():
    # The loss is w^2 times one more than the draws before it: times 1, where 3 is descended, see above; then, from 0.7,
    # times 2, where it is 2 * 2 * (0.7 + 0.5).
    def compute_objective(self, batch):
        draws = self.strategy_state["drawing"]["draws"]
        count = tf.convert_to_tensor(draws)
        assign([(draws, count + 1)])
        objective = super(Drawing, self).compute_objective(batch)
        return objective._replace(loss=objective.loss * tf.cast(count + 1, tf.float32))

    declaration = trainstep.Declaration(
        "drawing", trainstep.Stage.OBJECTIVE, "Draws.", "", neutral={},
        state=lambda options: {"draws": trainstep.Slot(dtype="int32")},
    )  # fmt: skip
    hooks = {"compute_objective": compute_objective}
    Drawing = type("Drawing", (trainstep.Strategy,), {"declaration": declaration, **hooks})  # noqa: N806
    with registered(Drawing):
        model = trainstep.apply(one_weight(1.0), {"sam": {"rho": 0.5}, "drawing": {}})
        model.compile(sgd(0.1), "mse")
        for expected in (1 - 0.1 * 3, 0.7 - 0.1 * 2 * 2 * 1.2):
            model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
            assert weight_of(model) == pytest.approx(expected, rel=1e-6)
        assert int(model.strategy_state["drawing"]["draws"].numpy()) == 2


def test_a_regularizer_is_part_of_both_evaluations():
    # loss = w^2 + 0.5 w^2: the gradient at 1 + 0.5 is 3 * 1.5.
    layer = keras.layers.Dense(
        1, use_bias=False, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.5)
    )
    model = trainstep.apply(keras.Sequential([keras.Input((1,)), layer]), "sam", rho=0.5)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert model.get_weights()[0][0, 0] == pytest.approx(1 - 0.1 * 4.5, rel=1e-6)


def test_the_ascent_is_never_clipped():
    # 3 is descended as above, and clipped to 1 only then.
    model = trainstep.apply(one_weight(1.0), {"sam": {"rho": 0.5}, "gradient_clipping": {"global_clipnorm": 2.5}})
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert weight_of(model) == pytest.approx(1 - 0.1 * 2.5, rel=1e-6)


@pytest.mark.skipif(KERAS_3, reason="only Keras 2 has a SAM of its own")
@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_that_of_keras_2_whole_and_in_parts(parts, assert_close):
    """Keras adds up the gradients of the parts where `micro_batches` takes their mean: hence the learning rate."""
    inner = dense()
    start = inner.get_weights()
    theirs = keras.models.experimental.SharpnessAwareMinimization(inner, rho=0.2, num_batch_splits=parts)
    theirs.compile(sgd(0.1 / parts), "mse")
    theirs.fit(X[:20], Y[:20], batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    ours = dense()
    ours.set_weights(start)
    trainstep.apply(ours, {"sam": {"rho": 0.2}, "micro_batches": {"count": parts}})
    ours.compile(sgd(0.1), "mse")
    ours.fit(X[:20], Y[:20], batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    assert_close(ours.get_weights(), inner.get_weights())


def test_what_other_strategies_add_to_the_loss_is_part_of_both_evaluations():
    # Half clean, half moved by epsilon = 1 along the sign of dL/dx: x' = 2. The loss is (w^2 + 4 w^2) / 2, its
    # gradient 5 w: at 1 + 0.5 it is 7.5.
    spec = {"sam": {"rho": 0.5}, "adversarial": {"epsilon": 1.0, "clean_weight": 0.5}}
    model = trainstep.apply(one_weight(1.0), spec)
    model.compile(sgd(0.1), "mse")
    model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    assert weight_of(model) == pytest.approx(1 - 0.1 * 7.5, rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_for_a_window_the_parts_of_a_batch_do_not_matter(adaptive, assert_close):
    options = {"rho": 0.5, "adaptive": adaptive}
    workload = Workload(dense, X, Y)
    whole = run(workload, "sam", options)
    window = run(workload, {"sam": {**options, "per": "window"}, "micro_batches": {"count": 3}})
    assert_close(window.variables, whole.variables)
    assert differs(run(workload, {"sam": options, "micro_batches": {"count": 3}}), whole)


def test_for_a_window_it_is_outside_of_what_cuts_the_batch():
    inside, outside = (trainstep.plan({"micro_batches": {}, "sam": {"per": per}}) for per in ("batch", "window"))
    assert list(inside.strategies) == ["micro_batches", "sam"]
    assert list(outside.strategies) == ["sam", "micro_batches"]


def test_a_window_of_several_batches_is_refused_and_the_way_is_named():
    spec = {"sam": {"per": "window"}, "gradient_accumulation": {}}
    with pytest.raises(errors.StrategyConflictError, match=r"need its batches twice.* cut it with 'micro_batches'"):
        trainstep.plan(spec)
    assert trainstep.plan({**spec, "sam": {"per": "window", "rho": 0.0}}).time == 1


def test_dropout_masks_in_parts_of_a_batch_are_those_of_the_first_evaluation():
    """At a learning rate of zero, where the second evaluation leaves no trace, what is drawn next is as without it."""
    workload = Workload(functional, X, Y, lambda: {"optimizer": sgd(0.0), "loss": "mse", "metrics": ["mae"]})
    parts = {"micro_batches": {"count": 2}}
    ours, plain = run(workload, {"sam": {"rho": 0.5, "per": "window"}, **parts}), run(workload, parts)
    if KERAS_3:
        assert_same(ours, plain)
    else:  # See above.
        assert not differs(ours._replace(variables=ours.variables[:4]), plain._replace(variables=plain.variables[:4]))


def on(distribution, options):
    keras.utils.set_random_seed(0)
    with distribution.scope():
        model = trainstep.apply(dense(), "sam", **options)
        model.compile(sgd(), "mse")
    model.fit(X[:20], Y[:20], batch_size=6, epochs=2, shuffle=False, verbose=0)  # Unequal shares, one of them empty.
    return model.get_weights()


def test_an_interval_on_several_replicas_is_that_of_one_device(mirrored_four, assert_close):
    options = {"rho": 0.5, "interval": 3}
    assert_close(on(mirrored_four, options), on(tf.distribute.get_strategy(), options))
