"""The comparison: every strategy, every workload, every seed, one control.

comparison = trainstep.compare(
    model=build, train=(x, y), validation=(x_val, y_val), seeds=5, epochs=10,
    strategies={"plain": "standard", "clipped": {"gradient_clipping": {"global_clipnorm": 1.0}}},
)
print(comparison)
"""

import functools
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from trainstep.benchmarks import engine, request
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.data import Source
from trainstep.benchmarks.errors import UnknownArgumentError
from trainstep.benchmarks.keeping import made_folder
from trainstep.benchmarks.records import Target
from trainstep.benchmarks.sinks import sinks
from trainstep.benchmarks.store import Store
from trainstep.composition import Spec
from trainstep.errors import nearest

if TYPE_CHECKING:
    from trainstep.benchmarks.comparison import Comparison

STORE = "results.sqlite"
"""Name of the store in an output folder."""


P = ParamSpec("P")
R = TypeVar("R")


def _by_name(function: Callable[P, R]) -> Callable[P, R]:
    """Let `function` refuse arguments it does not have as it refuses everything else."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **given: P.kwargs) -> R:
        if args:
            raise UnknownArgumentError(
                f"The arguments of `compare` have names: compare(strategies=...), not {args[0]!r}."
            )
        for name in given:
            if name not in known:
                raise UnknownArgumentError(
                    f"`compare` has no argument {name!r}.{nearest(name, known)} Arguments: {', '.join(known)}."
                )
        return function(*args, **given)

    return checked


@_by_name
def compare(
    *,
    strategies: Mapping[str, Spec] | Sequence[str] | None = None,
    experiment: Any = None,
    workload: str | Sequence[str] | None = None,
    noise: float | None = None,
    data_dir: str | Path | None = None,
    model: Callable[..., Any] | None = None,
    train: Source | Callable[[], Any] = None,
    validation: Source = None,
    seeds: int | Sequence[int] | None = None,
    epochs: int | None = None,
    updates: int | None = None,
    seconds: float | None = None,
    batch_size: int | None = None,
    optimizer: Any = None,
    learning_rate: float | None = None,
    loss: Any = None,
    metric: Any = None,
    metrics: Sequence[Any] | Mapping[str, Any] | None = None,
    higher_is_better: bool | None = None,
    attack: Attack | Mapping[str, Any] | bool | None = None,
    target: Target | Mapping[str, float] | float | None = None,
    output: str | Path | None = None,
    store: str | Path | None = None,
    workers: int | None = None,
    executor: str | None = None,
    cost: bool | None = None,
    time_limit: float | None = None,
    retry_failed: bool | None = None,
    tensorboard: str | Path | None = None,
    mlflow: str | Path | None = None,
    progress: bool | None = None,
) -> "Comparison":
    """Train one model by several strategies, from the same weights on the same data, and compare.

    All arguments are checked before data are read. Your own model is built, compiled and evaluated on two examples
    before anything runs, so that a model, a loss and data that do not go together are refused. A strategy that fails in
    training is a row with its reason. `standard` is the control, and added where it is missing. Each run sets the
    global random seeds of Python, NumPy and Keras in its process.

    Runs happen side by side in processes of their own, where a run that crashes, or takes longer than `time_limit`, is
    a row with its reason. What a step costs is measured before them, in a process of its own, while nothing else runs.
    With a `store`, or an `output`, each result is kept as soon as it is there: the same call goes on where one that was
    killed stopped, and what is there is not done again.

    Args:
        strategies: names; or a mapping from labels to what `trainstep.apply` takes: a name, a list of
            names, or a mapping from names to options.
        experiment: an `Experiment`, or the path of a file that describes one; other arguments override it.
        workload: one or several of `trainstep.benchmarks.workload.names()`; then `model`, `train` and `validation`
            are left out, and what is not given is as the workload has it.
        noise: share of training labels made wrong, the same ones for all runs.
        data_dir: folder with the data of workloads, where Keras's own has none.
        model: a function without arguments, or with one called `seed`, that returns a new
            `keras.Model`, not compiled, which shares no weights with another.
        train: (x, y) or (x, y, sample_weight), arrays or structures of arrays with the examples along
            the first axis; or a batched `tf.data.Dataset` that ends. Arrays are shuffled for each epoch,
            alike for all strategies; a dataset is iterated as it is, so give its `shuffle` a seed. Or a function
            that returns (train, validation), called once in each process.
        validation: the same; never shuffled.
        seeds: how many, counted from 0, or which; 5.
        epochs: passes over the training data; 10 without a workload.
        updates: instead of epochs: steps of training.
        seconds: instead of epochs: of training, tracing included and evaluation left out.
        batch_size: examples a step, for arrays; 32 without a workload.
        optimizer: a name, an optimizer to be copied, or a function that returns a new one; "adam".
        learning_rate: of an optimizer given by name, or of the workload's.
        loss: as in `keras.Model.compile`; "sparse_categorical_crossentropy".
        metric: a name, a metric to be copied, or a function that returns a new one; "accuracy". Of a model with several
            outputs it is the mean over them.
        metrics: several of them; verdicts are on the first. Or {output: metric, or several}, for each by itself, whose
            names are then OUTPUT:METRIC; and so may a metric be named.
        higher_is_better: of the first metric; None: as its name says.
        attack: budget of the attack for the robust accuracy: `Attack`, or a mapping with at least
            "epsilon" in units of the input. None: that of the workload, and none without one. False: none.
        target: the value of the first metric, or {metric: value}, whose first crossing is waited for.
        output: folder for the store, results.sqlite, and for report.html and report.md.
        store: file of the store, where it is another.
        workers: processes at once. None: one for each core, or 1 where the model or the data cannot be sent to another
            process, such as a `tf.data.Dataset`. 1: all happens in this process, costs too. Then a run that crashes or
            hangs cannot be survived, no `time_limit` can be given, and memory is not measured on a CPU.
        executor: "processes" of this machine, the default; or "ray": actors of the cluster Ray is connected to.
        cost: whether to measure what a step costs; True.
        time_limit: seconds a run may take, the start of its process left out.
        retry_failed: do again what is in the store as a failure.
        tensorboard: folder for TensorBoard's scalars and HParams of each run.
        mlflow: address of a server of MLflow, or path of an SQLite file of it, for each run.
        progress: show progress; None: where the error stream is a terminal.

    Returns:
        The comparison, with one run for each workload, strategy and seed.

    Raises:
        InvalidComparisonError, UnknownArgumentError, InvalidModelError, NotAModelError, InvalidDataError,
            MissingDataError: the arguments, the model or the data are wrong.
        StoreError: the store cannot be written, or is none.
        UnknownWorkloadError: there is no workload of that name.
        UnknownStrategyError, InvalidOptionsError, RepeatedStrategyError, StrategyConflictError,
            InvalidSpecError: the strategies or the attack are.
    """
    wanted, running = request.merged(experiment, {k: v for k, v in locals().items() if k != "experiment"})
    return run_suite(request.suite_of(**wanted), **running)


def run_suite(
    suite: engine.Suite,
    *,
    output: str | Path | None = None,
    store: str | Path | None = None,
    workers: int | None = None,
    executor: str = "processes",
    cost: bool = True,
    time_limit: float | None = None,
    retry_failed: bool = False,
    tensorboard: str | Path | None = None,
    mlflow: str | Path | None = None,
    progress: bool | None = None,
) -> "Comparison":
    """Run what `suite` lacks in its store, and return the comparison; see `compare` for the arguments."""
    from trainstep.benchmarks.comparison import Comparison  # noqa: PLC0415  Who only runs needs no plots.

    folder = None if output is None else made_folder(output)
    options = engine.Options(
        workers=workers,
        executor=executor,
        cost=cost,
        time_limit=time_limit,
        retry_failed=retry_failed,
        progress=progress,
        sinks=sinks(tensorboard, mlflow),
    )
    with tempfile.TemporaryDirectory() as nowhere:
        path = Path(store) if store is not None else (folder or Path(nowhere)) / STORE
        with Store(path) as opened:
            runs, costs = engine.run(suite, opened, options)
    comparison = Comparison(runs, costs, suite.control, folder)
    if folder is not None:
        comparison.write(folder)
    return comparison
