"""What is different when there are several replicas, and is written here once.

Under `tf.distribute` a step runs in every replica at once, each with its share of the batch. State
and weights are the same everywhere, so whatever changes them must be, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from trainstep import _seam
from trainstep.errors import ModelConflictError

_TRACES = "_trainstep_traces"


def check_distribution(model: Any) -> None:
    """Raise `ModelConflictError` where `model` was made under a distribution that strategies cannot be right under."""
    if isinstance(model.distribute_strategy, tf.distribute.ParameterServerStrategy):
        raise ModelConflictError(
            "Strategies do not train under ParameterServerStrategy: its workers update the weights each at its own "
            "time, so there is no one gradient to accumulate, to check or to clip. Use "
            "tf.distribute.MultiWorkerMirroredStrategy for many machines."
        )


def sum_over_replicas(tensors: Sequence[Any]) -> list[Any]:
    """Return the sum over all replicas of each tensor; a None stays None."""
    present = [tensor for tensor in tensors if tensor is not None]
    if tf.distribute.get_strategy().num_replicas_in_sync == 1 or not present:
        return list(tensors)
    replica_context = tf.distribute.get_replica_context()
    summed = iter(replica_context.all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [None if tensor is None else next(summed) for tensor in tensors]


def as_one(value: tf.Tensor) -> tf.Tensor:
    """Return `value`, the same on every replica, as one tensor: what Keras 2 takes for several it sums for the logs."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value

    def first(strategy: tf.distribute.Strategy, values: Any) -> tf.Tensor:
        return tf.identity(strategy.experimental_local_results(values)[0])

    return context.merge_call(first, args=(value,))


def place_among_replicas(count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return how many replicas before this one have, of what it has `count`, and how many all have: int32 scalars."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tf.constant(0), count
    mine = context.replica_id_in_sync_group
    [counts] = sum_over_replicas([count * tf.one_hot(mine, context.num_replicas_in_sync, dtype=tf.int32)])
    return tf.reduce_sum(counts[:mine]), tf.reduce_sum(counts)


def gather_over_replicas(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Return each tensor with its rows on all replicas, in their order: what one device would have."""
    if tf.distribute.get_strategy().num_replicas_in_sync == 1 or not tensors:
        return list(tensors)
    # By a sum in which each replica has zeros in place of what others have: `all_gather` of several machines fails
    # ("destinations can not be empty", up to TensorFlow 2.21 at least).
    first, count = place_among_replicas(tf.shape(tensors[0])[0])

    def among_zeros(tensor: tf.Tensor) -> tf.Tensor:
        summed = tensor if tensor.dtype in _SUMMED else tf.cast(tensor, _wider(tensor.dtype))
        after = count - first - tf.shape(tensor)[0]
        return tf.pad(summed, tf.stack([[first, after], *[[0, 0]] * (len(tensor.shape) - 1)]))

    gathered = sum_over_replicas([among_zeros(tensor) for tensor in tensors])
    return [tf.cast(rows, tensor.dtype) for rows, tensor in zip(gathered, tensors, strict=True)]


_SUMMED = (tf.float32, tf.float64, tf.int32, tf.int64)
"""What TensorFlow sums over replicas as it is."""


def _wider(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype.is_floating else tf.int32


def assign(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Assign to each state variable its new value, which must be the same on every replica."""
    _change(pairs, lambda variable, value: variable.assign(value))


def assign_add(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Add to each state variable, in place, a value which must be the same on every replica."""
    _change(pairs, lambda variable, value: variable.assign_add(value))


def add_scaled(pairs: Sequence[tuple[Any, Any]], factor: tf.Tensor) -> None:
    """Add to each state variable, in place and in one pass, `factor` times a dense value; the same on every replica."""

    def add(variable: tf.Variable, value: tf.Tensor, factor: tf.Tensor) -> None:
        # Descent by -factor; there is no other operation that multiplies and adds without a copy.
        alpha = -tf.cast(factor, variable.dtype)
        tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=alpha, delta=value)

    _change([(variable, value, factor) for variable, value in pairs], add)


def _change(changes: Sequence[tuple[Any, ...]], operation: Callable[..., Any]) -> None:
    """Call `operation` with each tuple of a variable and values."""
    if not changes:  # Of which several machines could not agree where they are.
        return
    variables = [_seam.tf_variable(variable) for variable, *_ in changes]
    values = [tuple(each) for _, *each in changes]
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        for variable, each in zip(variables, values, strict=True):
            operation(variable, *each)
        return

    def update(strategy: tf.distribute.Strategy, values: Sequence[tuple[Any, ...]]) -> None:
        for variable, each in zip(variables, values, strict=True):
            strategy.extended.update(variable, operation, args=each, group=False)

    context = tf.distribute.get_replica_context()
    if context is None:  # On the host, when an epoch is over.
        update(tf.distribute.get_strategy(), values)
    else:
        context.merge_call(update, args=(values,))


def conditional(
    predicate: tf.Tensor,
    true_branch: Callable[..., None],
    false_branch: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """Run one of two branches, either of which may update variables or weights; see `choose`."""
    choose(predicate, _with_a_value(true_branch), _with_a_value(false_branch), args)


def _with_a_value(branch: Callable[..., None]) -> Callable[..., list[tf.Tensor]]:
    def run(*args: Any) -> list[tf.Tensor]:
        branch(*args)
        return [tf.constant(0)]  # Both branches of a `tf.cond` must return something of one type.

    return run


def choose(
    predicate: tf.Tensor,
    true_branch: Callable[..., list[tf.Tensor]],
    false_branch: Callable[..., list[tf.Tensor]],
    args: tuple[Any, ...],
) -> list[tf.Tensor]:
    """Return the tensors that one of two branches returns, in each replica what it returns there.

    `predicate` is a boolean scalar, the same on every replica; `args` are nested tensors, passed to
    the branch that runs. Under several replicas a plain `tf.cond` around anything that sums over them or reaches the
    optimizer fails ("merge_call called while defining a new graph"), so the choice is made once for
    all replicas and each enters the branch anew: what differs between them has to be among `args`.
    """
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return tf.cond(predicate, lambda: true_branch(*args), lambda: false_branch(*args))

    def choose_for_all(strategy: tf.distribute.Strategy, predicates: Any, *args: Any) -> Any:
        def enter(branch: Callable[..., list[tf.Tensor]]) -> Callable[[], Any]:
            def run() -> Any:
                return strategy.extended.call_for_each_replica(branch, args=args)

            return run

        first = strategy.experimental_local_results(predicates)[0]
        return tf.cond(first, enter(true_branch), enter(false_branch))

    return tf.distribute.get_replica_context().merge_call(choose_for_all, args=(predicate, *args))


def run_in_replicas(model: Any, name: str, function: Callable[[], None]) -> None:
    """Run `function` once, outside a step, in every replica; traced once under `name`, until the next `compile`."""

    def run() -> None:
        model.distribute_strategy.run(function)

    if model.run_eagerly:
        run()
        return
    traces = vars(model).setdefault(_TRACES, {})  # Past Keras's tracking of attributes.
    if name not in traces:
        # A concrete function: TensorFlow counts calls of others by their code, and would warn a user who trains one
        # model after the other that this one is traced too often.
        traces[name] = tf.function(run).get_concrete_function()
    traces[name]()


def forget_traces(model: Any) -> None:
    """Let `run_in_replicas` trace its functions anew."""
    vars(model).pop(_TRACES, None)
