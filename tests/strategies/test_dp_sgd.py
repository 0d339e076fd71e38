"""DP-SGD: no example changes an update by more than its clip norm allows, and the noise is that of algorithm 1."""

import importlib.util
import math

import dp_accounting
import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import BATCH, KINDS, Task, Workload, X, Y, dense, functional, numbers, one_weight, sgd, tokens, weight_of
from runs import prepared, run

import trainstep
from trainstep import errors
from trainstep.strategies import dp_sgd

SEPARATE = Task(separate=True)
EVERY_EXAMPLE = {"noise_multiplier": 0.0}


def column(*values: float) -> np.ndarray:
    return np.array(values, "float32")[:, None]


def dense_weight() -> keras.Model:
    """Return y = w * x with w = 1, of a layer that takes no pass for each example."""
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])


@pytest.mark.parametrize("build", [one_weight, dense_weight])
def test_each_example_is_clipped_by_hand(build):
    # w = 1, g = 2 (w x - y) x: (1, 0): 2, (2, 0): 8, (2, 3): -4. Clipped to 3: 2, 3, -3; the mean is 2 / 3. Clipped
    # together it would be the mean of the gradients, 2.
    model = trainstep.apply(build(), "dp_sgd", l2_norm_clip=3.0, noise_multiplier=0.0)
    model.compile(sgd(0.375), "mse")
    model.train_on_batch(column(1, 2, 2), column(0, 0, 3))
    assert float(model.get_weights()[0].item()) == pytest.approx(1 - 0.375 * 2 / 3, rel=1e-6)


@pytest.mark.parametrize("build", [one_weight, dense_weight])
def test_a_sample_weight_is_part_of_the_loss_that_is_clipped(build):
    # The gradients 2 and 8 of the examples above, weighed by 2 and 0.25, are 4 and 2: clipped to 3, 3 and 2.
    model = trainstep.apply(build(), "dp_sgd", l2_norm_clip=3.0, noise_multiplier=0.0)
    model.compile(sgd(0.5), "mse")
    model.train_on_batch(column(1, 2), column(0, 0), np.array([2.0, 0.25]))
    assert float(model.get_weights()[0].item()) == pytest.approx(1 - 0.5 * 2.5, abs=1e-6)


@pytest.mark.parametrize("ghost", [True, False])
def test_a_regularizer_is_of_no_example_and_is_not_clipped(ghost):
    # x = 0: no gradient of the loss; that of 0.5 w^2 is w = 1, far above the clip norm.
    penalty = keras.regularizers.L2(0.5)
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", kernel_regularizer=penalty)
    model = keras.Sequential([keras.Input((1,)), layer])
    trainstep.apply(model, "dp_sgd", l2_norm_clip=0.001, noise_multiplier=0.0, ghost=ghost)
    model.compile(sgd(0.25), "mse")
    logs = model.train_on_batch(column(0, 0), column(0, 0), return_dict=True)
    assert float(model.get_weights()[0].item()) == 0.75
    assert logs["loss"] == 0.5


def regularized(task: Task = SEPARATE) -> keras.Model:
    x = keras.Input((6,))
    h = keras.layers.Dense(5, "tanh", kernel_regularizer=keras.regularizers.L2(0.01))(x)
    return keras.Model(x, keras.layers.Dense(1)(h))


def loop(clip: float, weights: np.ndarray) -> list[np.ndarray]:
    """Return the weights that algorithm 1 without noise leaves, written down with a GradientTape for each example."""
    keras.utils.set_random_seed(0)
    model = regularized()
    variables = model.trainable_variables
    for start in range(0, len(X), BATCH):
        sums = [np.zeros(variable.shape, "float32") for variable in variables]
        batch = range(start, min(start + BATCH, len(X)))
        for i in batch:
            with tf.GradientTape() as tape:
                loss = weights[i] * tf.reduce_mean(tf.square(model(X[i : i + 1]) - Y[i : i + 1]))
            gradients = [gradient.numpy() for gradient in tape.gradient(loss, variables)]
            norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
            sums = [total + g / max(1, norm / clip) for total, g in zip(sums, gradients, strict=True)]
        means = [total / len(batch) for total in sums]
        means[0] = means[0] + 2 * 0.01 * model.get_weights()[0]
        model.set_weights([w - 0.1 * mean for w, mean in zip(model.get_weights(), means, strict=True)])
    return model.get_weights()


@pytest.mark.parametrize("ghost", [True, False])
def test_it_is_an_own_loop_over_examples_with_weights_and_a_short_last_batch(ghost, assert_close):
    weights = np.linspace(0, 2, len(X)).astype("float32")
    workload = Workload(regularized, X, Y, fit={"sample_weight": weights})
    ours = run(workload, "dp_sgd", {"l2_norm_clip": 1.5, "ghost": ghost, **EVERY_EXAMPLE}, fit={"epochs": 1})
    assert_close(ours.variables, loop(1.5, weights))


# --- One pass is as many passes as there are examples -----------------------------------------------------------------


def images() -> Workload:
    """Convolutions that overlap, skip pixels, and are far apart."""
    layers = keras.layers
    net = lambda: keras.Sequential(  # noqa: E731
        [
            layers.Input((8, 8, 2)),
            layers.Conv2D(3, 3, padding="same", strides=2, activation="relu"),
            layers.Conv2D(4, 2, dilation_rate=2),
            layers.ReLU(),
            layers.MaxPooling2D(1),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    return Workload(net, numbers(22, 8, 8, 2), Y)


def sequences() -> Workload:
    """Causal convolutions, and a dense layer at each of a few places, whose norms come from products of places."""
    layers = keras.layers
    net = lambda: keras.Sequential(  # noqa: E731
        [
            layers.Input((5, 2)),
            layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
            layers.Dense(30, "gelu"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1, use_bias=False),
        ]
    )
    return Workload(net, numbers(22, 5, 2), Y)


def words() -> Workload:
    """Token numbers that repeat within an example, padding, and labels for each."""

    def net() -> keras.Model:
        x = keras.Input((5,), dtype="int32")
        return keras.Model(x, keras.layers.Dense(3)(keras.layers.Embedding(7, 4, mask_zero=True)(x)))

    x = tokens(22)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Workload(net, x, x % 3, lambda: {"optimizer": sgd(), "loss": loss, "metrics": ["accuracy"]})


def shared() -> Workload:
    """A layer that is called twice, one inside of a model, and one that is frozen."""

    def net() -> keras.Model:
        x = keras.Input((6,))
        twice = keras.layers.Dense(6, "tanh")
        inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, trainable=False), keras.layers.Dense(3)])
        return keras.Model(x, keras.layers.Dense(1)(inner(twice(twice(x)))))

    return Workload(net, X, Y)


def outputs() -> Workload:
    def net() -> keras.Model:
        x = keras.Input((6,))
        h = keras.layers.Dense(5, "tanh")(x)
        names = {"size": keras.layers.Dense(1, name="size"), "sign": keras.layers.Dense(1, "sigmoid", name="sign")}
        return keras.Model(x, {name: layer(h) for name, layer in names.items()})

    losses = {"size": "mse", "sign": keras.losses.BinaryCrossentropy()}
    compiled = {"loss": losses, "loss_weights": {"size": 0.5, "sign": 2.0}}
    return Workload(net, X, {"size": Y, "sign": (Y > 0) * 1.0}, lambda: {"optimizer": sgd(), **compiled})


@pytest.mark.parametrize("workload", [images, sequences, words, shared, outputs])
def test_one_pass_is_one_pass_for_each_example(workload, assert_close):
    def trained(ghost):
        model = prepared(workload(), "dp_sgd", {"l2_norm_clip": 0.5, "ghost": ghost, **EVERY_EXAMPLE})
        if ghost:
            assert dp_sgd.why_one_by_one(model) is None
        return run(workload(), "dp_sgd", {"l2_norm_clip": 0.5, "ghost": ghost, **EVERY_EXAMPLE})

    ghost, one_by_one = trained(True), trained(False)
    assert_close(ghost.variables, one_by_one.variables)
    assert_close(ghost.history["loss"], one_by_one.history["loss"])  # That of one output counts each call alike.


@pytest.mark.parametrize("workload", [images, sequences, words, shared, outputs])
@pytest.mark.parametrize("ghost", [True, False])
def test_a_clip_norm_above_all_norms_is_plain_keras(workload, ghost, assert_close):
    ours = run(workload(), "dp_sgd", {"l2_norm_clip": 1e6, "ghost": ghost, **EVERY_EXAMPLE})
    plain = run(workload())
    assert_close(ours.variables, plain.variables)
    assert_close(ours.history["loss"], plain.history["loss"])


def with_(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1)])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(1)

    def call(self, x):
        return self.out(x + tf.reduce_mean(x, axis=0))


class OwnLoss(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        return tf.square(tf.reduce_mean(y_pred - y))


def along_examples() -> keras.Model:
    x = keras.Input((6,))
    return keras.Model(x, keras.layers.Dense(1)(keras.layers.Concatenate(axis=0, name="along")([x, x])))


def mixing_activation(x):
    return x - tf.reduce_mean(x, axis=0)


@pytest.mark.parametrize(
    ("build", "loss", "why"),
    [
        (lambda: with_(keras.layers.LayerNormalization(name="norm")), "mse", "LayerNormalization 'norm' is not among"),
        (lambda: with_(keras.layers.Dense(2, mixing_activation, name="own")), "mse", "Dense 'own' is not among"),
        (along_examples, "mse", "Concatenate 'along' is not among"),
        (lambda: with_(keras.layers.Dense(2, activity_regularizer="l2", name="of")), "mse", "Dense 'of' is not"),
        (with_, lambda y, y_pred: tf.square(y - tf.reduce_mean(y_pred)), "the loss .* is not known"),
        (Subclassed, "mse", "does more than to call its layers"),
        (lambda: OwnLoss([keras.Input((6,)), keras.layers.Dense(1)]), "mse", "the loss .* is not known"),
    ],
)  # fmt: skip
def test_where_examples_may_mix_they_are_evaluated_one_by_one(build, loss, why):
    model = trainstep.apply(build(), "dp_sgd")
    model.compile(sgd(), loss)
    found = dp_sgd.why_one_by_one(model)
    assert found is not None
    tf.debugging.assert_equal(tf.strings.regex_full_match(found, f".*{why}.*"), True)


def test_other_losses_are_of_one_example_where_there_is_one():
    model = trainstep.apply(with_(), ["dp_sgd", "gradient_penalty"])
    model.compile(sgd(), "mse")
    assert "what 'gradient_penalty' makes of the loss" in dp_sgd.why_one_by_one(model)


@pytest.mark.parametrize("kind", ["dense", "mixing", "functional"])
def test_no_example_changes_an_update_by_more_than_twice_its_clip_norm(kind):
    """Whatever it is replaced by, and whatever the model makes of all of them together."""
    builds = {"dense": dense, "mixing": Subclassed, "functional": lambda: functional(SEPARATE)}
    after = []
    for value in (1.0, 1e4):
        keras.utils.set_random_seed(0)
        model = trainstep.apply(builds[kind](), "dp_sgd", l2_norm_clip=0.25, noise_multiplier=0.0)
        model.compile(sgd(1.0), "mse")
        x = X[:4].copy()
        x[2] *= value
        model.train_on_batch(x, Y[:4])
        after.append(np.concatenate([weight.ravel() for weight in model.get_weights()]))
    moved = np.linalg.norm(after[1] - after[0])
    assert 0 < moved <= 2 * 0.25 / 4 * (1 + 1e-5)


# --- The noise --------------------------------------------------------------------------------------------------------


def moves(spec: dict, updates: int, examples: int, steps: int = 1, batch: int | None = None) -> np.ndarray:
    """Return how far 10,000 weights whose gradient is 0 move in each update of SGD(1): (updates, weights)."""
    layers = [keras.Input((100,)), keras.layers.Dense(100, use_bias=False, kernel_initializer="zeros")]
    model = trainstep.apply(keras.Sequential(layers), spec)
    model.compile(sgd(1.0), "mse")
    found, before = [], model.get_weights()[0]
    x = np.zeros((examples, 100), "float32")
    for _ in range(updates):
        model.fit(x, x, batch_size=batch or examples, shuffle=False, verbose=0)
        after = model.get_weights()[0]
        found.append((before - after).ravel())
        before = after
    return np.array(found)


NOISE = {"l2_norm_clip": 2.0, "noise_multiplier": 1.5}


@pytest.mark.parametrize(
    ("others", "batch"),
    [({}, 6), ({"micro_batches": {"count": 3}}, 6), ({"gradient_accumulation": {"steps": 3}}, 2)],
    ids=["alone", "in parts", "in a window"],
)
def test_the_noise_is_added_once_to_the_sum_of_all_examples_of_an_update(others, batch):
    noise = moves({"dp_sgd": NOISE, **others}, 3, examples=6, batch=batch)
    # Standard deviation 1.5 * 2 on the sum, so 3 / 6 on the mean; of 10,000 the sample variance is within 5 %.
    np.testing.assert_allclose(noise.var(axis=1), (3 / 6) ** 2, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=4 * 0.5 / 100)
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.05


def test_a_seed_gives_the_same_noise_and_another_seed_another():
    first, again, other = (moves({"dp_sgd": {**NOISE, "seed": seed}}, 1, 4) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first[0], other[0])[0, 1]) < 0.05


def test_noise_of_another_strategy_with_the_same_seed_is_other_noise():
    spec = {"gradient_noise": {"eta": 1.0, "gamma": 0.0}}
    assert abs(np.corrcoef(moves({"dp_sgd": NOISE}, 1, 4)[0], moves(spec, 1, 4)[0])[0, 1]) < 0.05


def test_two_replicas_add_the_noise_of_one_device_and_log_its_epsilon(mirrored, assert_close):
    found = []
    for distribution in (tf.distribute.get_strategy(), mirrored):
        keras.utils.set_random_seed(0)
        with distribution.scope():
            model = trainstep.apply(dense(), "dp_sgd", num_examples=len(X))
            model.compile(sgd(), "mse")
        history = model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
        found.append((model.get_weights(), {key: list(map(float, values)) for key, values in history.items()}))
    assert_close(found[1], found[0])


# --- Epsilon ----------------------------------------------------------------------------------------------------------


def renyi(order: int, q: float, sigma: float) -> float:
    """Return the Renyi divergence of one update: Mironov et al., 2019, for an integer order."""
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-q) + k * math.log(q) + (k * k - k) / (2 * sigma**2)
        for k in range(order + 1)
    ]  # fmt: skip
    return np.logaddexp.reduce(terms) / (order - 1)


def test_epsilon_of_the_paper_and_a_tighter_one_of_the_same_divergences():
    # Abadi et al., section 3.2: q = 0.01, sigma = 4, delta = 1e-5, 10,000 updates: 1.26, by a bound since improved
    # (Canonne et al., 2020, proposition 12).
    q, sigma, updates, delta = 0.01, 4.0, 10_000, 1e-5
    orders = np.arange(2, 64)
    divergences = np.array([updates * renyi(order, q, sigma) for order in orders.tolist()])
    assert np.min(divergences - math.log(delta) / (orders - 1)) == pytest.approx(1.26, abs=0.005)
    tighter = np.min(divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1))
    ours = dp_sgd.epsilon(noise_multiplier=sigma, sampling_probability=q, updates=updates, delta=delta)
    assert ours == pytest.approx(tighter, rel=1e-3)


def test_epsilon_is_that_of_the_accountant_called_directly():
    accountant = dp_accounting.rdp.RdpAccountant()
    gaussian = dp_accounting.GaussianDpEvent(1.1)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.02, gaussian), 500)
    ours = dp_sgd.epsilon(noise_multiplier=1.1, sampling_probability=0.02, updates=500, delta=1e-6)
    assert ours == accountant.get_epsilon(1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 3.0}, "delta: .*less than 1.*3"),
        ({"updates": -1}, "updates: "),
        ({"noise_multiplier": "a"}, "noise_"),
    ],
)
def test_numbers_that_no_privacy_comes_of_are_refused(wrong, message):
    arguments = {"noise_multiplier": 1.1, "sampling_probability": 0.02, "updates": 500, "delta": 1e-6}
    with pytest.raises(errors.InvalidOptionsError, match=message):
        dp_sgd.epsilon(**{**arguments, **wrong})


def test_orders_that_the_accountant_leaves_out_are_no_news(caplog):
    """With little noise and large batches it says so many times in a row, of what changes nothing."""
    arguments = {"noise_multiplier": 0.5, "sampling_probability": 0.125, "updates": 80, "delta": 1e-4}
    assert math.isfinite(dp_sgd.epsilon(**arguments))
    assert not caplog.records
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.125, dp_accounting.GaussianDpEvent(0.5)), 80)
    assert "Excluding this order" in caplog.text  # Or there would be nothing to leave out.


def test_a_batch_of_more_examples_than_there_are_is_told():
    model = trainstep.apply(dense(), "dp_sgd", num_examples=3)
    model.compile(sgd(), "mse")
    with pytest.warns(UserWarning, match="a batch had 4 loss terms, more than num_examples=3"):
        model.fit(X, Y, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize(
    ("others", "updates", "largest"), [({}, 6, 4), ({"gradient_accumulation": {"steps": 4}}, 2, 16)]
)
def test_each_epoch_logs_what_all_updates_so_far_have_spent(others, updates, largest):
    """22 examples in batches of 4: six updates; in windows of 16 and 6, two, the last one when the epoch is over."""
    model = trainstep.apply(dense(), {"dp_sgd": {"noise_multiplier": 1.3, "num_examples": 22}, **others})
    model.compile(sgd(), "mse")
    history = model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0).history
    expected = [
        dp_sgd.epsilon(noise_multiplier=1.3, sampling_probability=largest / 22, updates=count, delta=1e-5)
        for count in (updates, 2 * updates)
    ]
    assert history["epsilon"] == pytest.approx(expected, rel=1e-6)


def test_without_a_number_of_examples_nothing_is_logged():
    assert run(KINDS["without training argument"], "dp_sgd").history.keys() == {"loss"}


# --- What is refused --------------------------------------------------------------------------------------------------


def test_batch_norm_is_refused_by_name_unless_it_is_frozen():
    with pytest.raises(errors.ModelConflictError, match=r"'norm' normalizes all.*LayerNormalization"):
        trainstep.apply(functional(), "dp_sgd")
    model = functional()
    model.get_layer("norm").trainable = False
    trainstep.apply(model, "dp_sgd").compile(sgd(), "mse")
    assert dp_sgd.why_one_by_one(model) is None
    before = model.get_layer("norm").get_weights()
    model.fit(X, Y, verbose=0)
    tf.nest.map_structure(np.testing.assert_array_equal, model.get_layer("norm").get_weights(), before)


def test_a_sum_is_refused():
    model = trainstep.apply(dense(), "dp_sgd")
    model.compile(sgd(), keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(errors.ModelConflictError, match="the loss is a sum"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("options", [{"weighting": "batches"}, {"reduction": "sum"}])
def test_windows_that_are_no_mean_over_examples_are_refused(options):
    with pytest.raises(errors.ModelConflictError, match="a mean over the examples of a window"):
        trainstep.apply(dense(), {"dp_sgd": {}, "gradient_accumulation": options})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"l2_norm_clip": math.inf}, "must be finite"),
        ({"noise_multiplier": 0.0, "num_examples": 100}, "infinite without noise"),
        ({"num_examples": 100, "delta": 0.01}, "below 1 / num_examples = 0.01"),
    ],
)
def test_options_that_promise_nothing_are_refused(options, why):
    with pytest.raises(errors.InvalidOptionsError, match=why):
        trainstep.apply(dense(), "dp_sgd", **options)


def test_without_the_accountant_nothing_is_promised(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.InvalidOptionsError, match=r"trainstep\[privacy\]"):
        trainstep.apply(dense(), "dp_sgd", num_examples=22)
    assert weight_of(trainstep.apply(one_weight(), "dp_sgd")) == 1.0
