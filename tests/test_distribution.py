"""Two replicas do what one device does."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from catalogue import EVALUATING, REPRESENTATIVES, VARIANTS, coarsest_dtype, spec_of, task_of, variant_id
from nets import X, dense, masked, one_weight, sgd, tokens, weight_of
from runs import optimizer_variables

import trainstep
from trainstep import errors
from trainstep._seam import KERAS_3

pytestmark = pytest.mark.filterwarnings("ignore:mixed_precision computes in float16:UserWarning")

EXAMPLES = 20
FULL = {
    "adversarial": {"epsilon": 0.1},
    "gradient_accumulation": {"steps": 2},
    "mixed_precision": {"dtype": "float16"},
    "gradient_clipping": {"global_clipnorm": 0.5},
}


def one_device() -> tf.distribute.Strategy:
    return tf.distribute.get_strategy()


def train(
    distribution,
    spec,
    x=None,
    optimizer=sgd,
    epochs=2,
    *,
    batch_size=4,
    examples=EXAMPLES,
    sample_weight=None,
    **compiled,
):
    """Train, by default on batches of 4, two on each of two replicas; return the model, its weights and the logs."""
    task = task_of(*(spec or ()))
    keras.utils.set_random_seed(0)
    with distribution.scope():
        model = dense(task)
        if spec:
            trainstep.apply(model, spec)
        metrics = {} if task.outputs else {"metrics": ["mae"]}
        model.compile(**{"optimizer": optimizer(), "loss": task.loss, **metrics, **compiled})
    x, y = tf.nest.map_structure(lambda values: values[:examples], (task.x if x is None else x, task.y))
    history = model.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, sample_weight=sample_weight
    ).history
    return (
        model,
        [w.copy() for w in model.get_weights()],
        {
            key: list(map(float, value))
            for key, value in history.items()
            if key not in ("kind_loss", "value_loss")  # See `comparable`.
        },
    )


@pytest.fixture
def assert_equal_on_two(mirrored, assert_close):
    """Return the check that two replicas leave the weights and the logs of one device."""
    return functools.partial(compare, mirrored, assert_close)


def compare(mirrored, assert_close, spec, **arguments):
    # Eagerly, which is equal but for rounding, as `test_contract.py` shows, and less work.
    model, weights, history = train(one_device(), spec, **{"run_eagerly": True, **arguments})
    _, two_weights, two_history = train(mirrored, spec, **arguments)
    dtype = coarsest_dtype(model)
    assert_close(two_weights, weights, dtype)
    assert_close(two_history, history, dtype)


def test_there_are_four_logical_devices(mirrored, mirrored_four):
    assert len(tf.config.list_logical_devices("CPU")) == 4
    assert mirrored.num_replicas_in_sync == 2
    assert mirrored_four.num_replicas_in_sync == 4


@pytest.mark.shows("mirrored")
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=variant_id)
def test_two_replicas_are_one_device(name, options, assert_equal_on_two):
    """With shares of 2 and 1, and in the last batch 1 and none, where a strategy evaluates the net on its share.

    All others see gradients that are summed already, whatever the shares.
    """
    # Within a graph TensorFlow's oneDNN makes a wrong shape of a convolution of no examples: images end with 1 and 1.
    shares = {"batch_size": 3, "examples": 20 if task_of(name).images else 19} if name in EVALUATING else {}
    if options.get("dtype") == "float16":
        options = options | {"initial_scale": 2.0**8}  # At the usual one three examples overflow where two do not.
    assert_equal_on_two({name: options}, epochs=1, metrics=None, **shares)


@pytest.mark.parametrize(
    "optimizer", [lambda: sgd(0.1, momentum=0.9), lambda: keras.optimizers.Adam(0.01)], ids=["momentum", "adam"]
)
def test_the_optimizers_slots_are_those_of_one_device(optimizer, mirrored, assert_close):
    spec = {"gradient_accumulation": {"steps": 2}, "gradient_clipping": {"global_clipnorm": 0.5}}
    one, *_ = train(one_device(), spec, optimizer=optimizer)
    two, *_ = train(mirrored, spec, optimizer=optimizer)
    assert_close(optimizer_variables(two.optimizer), optimizer_variables(one.optimizer))


@pytest.mark.shows("mirrored", of="all together")
@pytest.mark.parametrize("random_start", [False, True])
def test_the_full_stack_on_two_replicas_is_that_of_one_device(random_start, assert_equal_on_two):
    """With a random start too: each replica draws the noise its examples have on one device."""
    assert_equal_on_two(FULL | {"adversarial": {"epsilon": 0.1, "random_start": random_start}})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_draws_the_same_noise_on_two_replicas(norm, assert_equal_on_two):
    assert_equal_on_two({"adversarial": {"attack": "pgd", "steps": 2, "epsilon": 0.1, "norm": norm}})


@pytest.mark.skipif(KERAS_3, reason="Keras 3 cannot")
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_steps_per_execution_on_two_replicas(name, assert_equal_on_two):
    assert_equal_on_two(spec_of(name), steps_per_execution=2)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 can")
def test_steps_per_execution_on_two_replicas_is_refused(mirrored):
    with pytest.raises(errors.ModelConflictError, match="steps_per_execution=2 with 2 replicas fails"):
        train(mirrored, {"standard": {}}, steps_per_execution=2)


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 can")
def test_plain_keras_cannot_run_several_steps_on_two_replicas(mirrored):
    """The reason for the refusal above: to be lifted when this fails."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="feed a value for placeholder"):
        train(mirrored, None, epochs=1, steps_per_execution=2)


def test_a_bad_batch_is_skipped_by_all_replicas(mirrored):
    x = X.copy()
    x[1] = np.nan  # In the first replica's half of the first batch.
    model, weights, _ = train(mirrored, {"mixed_precision": {"dtype": "float16"}}, x=x, epochs=1)
    assert all(np.isfinite(w).all() for w in weights)
    assert model.strategy_state["mixed_precision"]["scale"].numpy() == 2.0**14
    assert int(model.optimizer.iterations.numpy()) == 4


def test_the_last_window_is_applied_on_all_replicas(mirrored, assert_equal_on_two):
    assert_equal_on_two({"gradient_accumulation": {"steps": 3}})
    model, *_ = train(mirrored, {"gradient_accumulation": {"steps": 3}}, epochs=1)
    assert int(model.optimizer.iterations.numpy()) == 2  # Five batches: a window of three, and one of two.


def test_the_summed_gradient_is_clipped_by_hand(mirrored):
    # w = 1, g = 2 (w x - y) x: replica one sees (2, 0): 8, replica two (2, 5): -12. The mean is -2, within 3.
    # Clipped on each replica by itself it would be (3 - 3) / 2 = 0.
    with mirrored.scope():
        model = trainstep.apply(one_weight(), "gradient_clipping", global_clipnorm=3.0)
        model.compile(sgd(0.125), "mse")
    x, y = np.array([[2.0], [2.0]], "float32"), np.array([[0.0], [5.0]], "float32")
    model.fit(x, y, batch_size=2, shuffle=False, verbose=0)
    assert weight_of(model) == 1 + 0.125 * 2


def test_too_many_skips_stop_training_on_two_replicas(mirrored):
    x = np.full((20, 6), np.nan, "float32")
    with pytest.raises(errors.NonFiniteGradientError, match="not finite 2 updates in a row"):
        train(mirrored, {"mixed_precision": {"dtype": "float16", "max_consecutive_skips": 2}}, x=x)


def test_plain_keras_on_two_replicas_is_the_control(mirrored):
    _, weights, history = train(mirrored, None)
    _, ours, our_history = train(mirrored, {"standard": {}})
    assert our_history == history
    tf.nest.map_structure(np.testing.assert_array_equal, ours, weights)


# A batch of 8 is two examples for each of four replicas, and the last, of 4, one: 20 examples in three steps. A batch
# of 6 is shared as 2, 2, 2 and none, the last, of 2, as 1, 1, none and none; one of 7 as 2, 2, 2 and 1.
EQUAL, UNEQUAL = 8, 6


def shares(batch_size: int, replicas: int = 4) -> np.ndarray:
    """Return the weight each example has in its batch where the gradient is the mean of the replicas' means.

    A batch of n examples in shares of s counts each of a share as 1 / (replicas * s), where one device counts 1 / n.
    """
    weights = []
    for start in range(0, EXAMPLES, batch_size):
        count = min(batch_size, EXAMPLES - start)
        largest = -(-count // replicas)
        sizes = [min(largest, count - done) for done in range(0, count, largest)]
        weights += [count / (replicas * size) for size in sizes for _ in range(size)]
    return np.array(weights, "float32")


STACK = FULL | {"skip_nonfinite": {}, "adversarial": {"epsilon": 0.1, "random_start": True}}


def test_four_replicas_are_one_device(mirrored_four, assert_close):
    compare(mirrored_four, assert_close, STACK, batch_size=EQUAL)


@pytest.mark.shows("mirrored", of="all together")
@pytest.mark.parametrize("batch_size", [UNEQUAL, 7])
def test_the_full_stack_with_unequal_shares_is_that_of_one_device(batch_size, mirrored_four, assert_close):
    """With a loss scale far from overflow, which comes at other scales where the mean is over fewer examples."""
    spec = STACK | {"mixed_precision": {"dtype": "float16", "initial_scale": 2.0**8}}
    compare(mirrored_four, assert_close, spec, batch_size=batch_size)


@pytest.mark.skipif(KERAS_3, reason="Keras 3 fails, see below")
def test_plain_keras_counts_an_example_in_a_smaller_share_for_more(mirrored_four, assert_close):
    """The one place where `standard` is not plain Keras, which is here not one device."""
    _, four_weights, _ = train(mirrored_four, None, batch_size=UNEQUAL)
    _, weights, _ = train(one_device(), None, batch_size=UNEQUAL, sample_weight=shares(UNEQUAL))
    assert_close(four_weights, weights)


def test_unequal_shares_of_a_sum_need_no_weights(mirrored, assert_close):
    loss = keras.losses.MeanSquaredError(reduction="sum")
    arguments = {"batch_size": 5, "optimizer": lambda: sgd(0.005), "loss": loss}
    _, weights, _ = train(one_device(), {"standard": {}}, **arguments)
    _, two_weights, _ = train(mirrored, {"standard": {}}, **arguments)
    assert_close(two_weights, weights)


@pytest.mark.parametrize("name", ["standard", "gradient_accumulation"])
def test_unmasked_entries_count_alike_on_all_replicas(name, mirrored, assert_close):
    x = tokens(20)
    left = []
    for distribution in (one_device(), mirrored):
        keras.utils.set_random_seed(0)
        with distribution.scope():
            model = trainstep.apply(masked(), name)
            model.compile(sgd(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, x % 3, batch_size=4, shuffle=False, verbose=0)
        left.append(model.get_weights())
    assert_close(left[1], left[0])


@pytest.mark.skipif(not KERAS_3, reason="Keras 2 can")
def test_plain_keras_cannot_begin_with_unequal_shares(mirrored_four):
    """So that there is no control on Keras 3: to be lifted when this fails."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have the same size and shape"):
        train(mirrored_four, None, epochs=1, batch_size=7)
