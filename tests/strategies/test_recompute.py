"""Recompute keeps less of a forward pass, and changes no gradient."""

import gc
import weakref
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import AddsLoss, Task, Workload, X, Y, functional, one_weight, sgd, tokens, weight_of
from runs import Run, assert_same, optimizer_variables, prepared, run

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3

EVERYTHING = {"layers": ("block", "flat")}


@keras.utils.register_keras_serializable("trainstep_tests")
class Counts(keras.layers.Layer):
    """Passes its input on, and counts how often it does."""

    calls = 0

    def call(self, x):
        Counts.calls += 1
        return x * 1.0


def blocks(drop: bool = KERAS_3) -> keras.Model:
    """Return a net with a block of a regularizer, batch norm and, where it can be drawn again, dropout; and more."""
    x = keras.Input((6,))
    layers = [keras.layers.Dense(8, "gelu", kernel_regularizer="l2"), keras.layers.BatchNormalization()]
    layers += [keras.layers.Dropout(0.3, seed=1)] if drop else []
    block = keras.Sequential([keras.Input((6,)), *layers, Counts(), keras.layers.Dense(6, "tanh")], name="block")
    h = keras.layers.Dense(5, "tanh", name="flat")(block(x))
    return keras.Model(x, keras.layers.Dense(1, name="last")(h))


def workload(**compiled) -> Workload:
    return Workload(blocks, X[:20], Y[:20], lambda: {"optimizer": sgd(), "loss": "mse", "metrics": ["mae"], **compiled})


def parts(result: Run) -> list:
    return [result.variables, result.optimizer, result.history]


def test_one_weight_by_hand():
    # w = 1, g = 2 (w x - y) x = 2 * 2 * 2 = 8 for (2, 0).
    model = one_weight(1.0)
    trainstep.apply(model, "recompute", layers=(model.layers[-1].name,))
    model.compile(sgd(0.125), "mse")
    model.train_on_batch(np.full((1, 1), 2.0), np.zeros((1, 1)))
    assert weight_of(model) == 0.0


def test_step_by_step_it_is_plain_keras_bit_for_bit():
    """Masks of dropout, batch-norm statistics, the regularizer, metrics and random state included."""
    eager = workload(run_eagerly=True)
    assert_same(run(eager, "recompute", EVERYTHING), run(eager))


@pytest.mark.parametrize("compiled", [{}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str)
def test_however_the_step_runs_it_is_plain_keras(compiled, assert_close):
    plain = workload(**{"jit_compile": False, **compiled})
    assert_close(parts(run(plain, "recompute", EVERYTHING)), parts(run(plain)))


def test_the_inside_is_called_again_for_each_gradient_and_only_then():
    model = prepared(workload(run_eagerly=True), "recompute", EVERYTHING)
    Counts.calls = 0
    model.train_on_batch(X[:4], Y[:4])
    assert Counts.calls == 2
    model.evaluate(X[:4], Y[:4], verbose=0)
    assert Counts.calls == 3
    plain = prepared(workload(run_eagerly=True), "recompute", {"layers": ("flat",)})
    Counts.calls = 0
    plain.train_on_batch(X[:4], Y[:4])
    assert Counts.calls == 1


def test_nothing_of_the_inside_is_kept():
    """What of the forward pass is still there when the loss is known: by weak reference."""
    kept = []

    class Watched(keras.layers.Layer):
        def call(self, x):
            y = tf.exp(x)  # Its gradient takes what it returned.
            kept.append(weakref.ref(y))
            return tf.reduce_sum(y, axis=-1, keepdims=True)

    alive = {}
    for layers in ((), ("watched",)):
        kept.clear()
        x = keras.Input((6,))
        net = keras.Model(x, Watched(name="watched")(keras.layers.Dense(6)(x)))
        model = trainstep.apply(net, "recompute", layers=layers)
        model.compile(sgd(), "mse", run_eagerly=True)
        kept.clear()
        with tf.GradientTape() as tape:
            loss = model.compute_objective(trainstep.Batch(tf.constant(X[:4]), tf.constant(Y[:4]))).loss
        gc.collect()
        alive[layers] = [reference() is not None for reference in kept]
        assert tape.gradient(loss, model.trainable_variables)[0] is not None
    assert alive == {(): [True], ("watched",): [False]}


def test_two_replicas_do_what_they_do_without_it(mirrored, assert_close):
    found = []
    for spec in ({"recompute": {"layers": ("block", "flat")}}, "standard"):
        keras.utils.set_random_seed(0)
        with mirrored.scope():
            model = trainstep.apply(blocks(), spec)
            model.compile(sgd(0.01), "mse")
        model.fit(X[:20], Y[:20], batch_size=10, shuffle=False, verbose=0)
        found.append(model.get_weights())
    assert_close(*found)


@pytest.mark.parametrize(
    "others", [["micro_batches"], ["sam"], ["gradient_accumulation", "gradient_clipping"], ["adversarial"]]
)
def test_others_get_the_gradients_they_get_without_it(others, assert_close):
    spec = {name: {} for name in others}
    plain = workload(run_eagerly=True)
    assert_close(parts(run(plain, {**spec, "recompute": EVERYTHING})), parts(run(plain, spec)))


def test_in_16_bits_the_inside_is_in_16_bits_the_second_time_too():
    spec = {"mixed_precision": {"dtype": "bfloat16"}}
    plain = workload(run_eagerly=True)
    assert_same(run(plain, {**spec, "recompute": EVERYTHING}), run(plain, spec))


def test_masks_pass_through(assert_close):
    def net() -> keras.Model:
        x = keras.Input((5,), dtype="int32")
        h = keras.layers.Embedding(7, 4, mask_zero=True, name="table")(x)
        h = keras.layers.Dense(3, "tanh", name="hidden")(h)
        return keras.Model(x, keras.layers.Dense(3)(h))

    x = tokens(20)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    masked = Workload(net, x, x % 3, lambda: {"optimizer": sgd(), "loss": loss, "metrics": ["accuracy"]})
    assert_close(parts(run(masked, "recompute", {"layers": ("table", "hidden")})), parts(run(masked)))


def test_the_layers_are_as_before_and_a_file_holds_the_option(tmp_path):
    # Without dropout, whose random state Keras does not restore from a file in a model inside of another.
    model = prepared(Workload(partial(blocks, drop=False), X, Y), "recompute", EVERYTHING)
    before = [vars(layer).keys() - {"built"} for layer in model.layers]
    model.fit(X[:8], Y[:8], batch_size=4, verbose=0)
    assert [vars(layer).keys() - {"built"} for layer in model.layers] == before
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert trainstep.applied(loaded) == trainstep.applied(model)
    for each in (model, loaded):
        each.fit(X[8:16], Y[8:16], batch_size=4, shuffle=False, verbose=0)
    tf.nest.map_structure(
        np.testing.assert_array_equal, optimizer_variables(loaded.optimizer), optimizer_variables(model.optimizer)
    )
    tf.nest.map_structure(np.testing.assert_array_equal, loaded.get_weights(), model.get_weights())


def test_the_second_epoch_traces_nothing():
    model = prepared(workload(), "recompute", EVERYTHING)
    model.fit(X[:20], Y[:20], batch_size=4, verbose=0)
    Counts.calls = 0
    model.fit(X[:20], Y[:20], batch_size=4, epochs=2, verbose=0)
    assert Counts.calls == 0


# --- What is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_layer_is_named_with_the_nearest():
    with pytest.raises(errors.ModelConflictError, match=r"no layer is called 'blok'. Did you mean 'block'\?"):
        trainstep.apply(blocks(), "recompute", layers=("blok",))


@pytest.mark.skipif(KERAS_3, reason="Keras 3 keeps the state of dropout in variables")
@pytest.mark.parametrize("pattern", ["drop", "d*"])
def test_keras_2_cannot_draw_the_same_dropout_again(pattern):
    with pytest.raises(errors.ModelConflictError, match="'drop' draws random numbers"):
        trainstep.apply(functional(Task()), "recompute", layers=(pattern,))


def test_a_layer_that_adds_a_loss_inside_is_refused():
    x = keras.Input((6,))
    model = keras.Model(x, keras.layers.Dense(1)(AddsLoss(name="adds")(keras.layers.Dense(3)(x))))
    trainstep.apply(model, "recompute", layers=("adds",)).compile(sgd(), "mse")
    with pytest.raises(errors.ModelConflictError, match="'adds' adds to the loss in its call"):
        model.fit(X, Y, verbose=0)
