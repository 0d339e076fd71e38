"""The comparison: every strategy, every seed, one control.

comparison = trainstep.compare(
    model=build, train=(x, y), validation=(x_val, y_val), seeds=5, epochs=10,
    strategies={"plain": "standard", "clipped": {"gradient_clipping": {"global_clipnorm": 1.0}}},
)
print(comparison)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainstep.benchmarks import report, request
from trainstep.benchmarks import workload as workloads
from trainstep.benchmarks.attack import Attack
from trainstep.benchmarks.cost import measure_costs
from trainstep.benchmarks.data import Source
from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.progress import Progress
from trainstep.benchmarks.result import Cell, Settings, free_folder, write_line
from trainstep.benchmarks.runner import Trainer, run_cell
from trainstep.benchmarks.summary import Row, rows
from trainstep.composition import Spec


@dataclass(frozen=True)
class Comparison:
    """What came out. Prints as a table."""

    cells: tuple[Cell, ...]
    """One for each strategy and seed."""
    control: str
    """Label of the strategy the others are compared with."""
    output: Path | None = None
    """The folder with results.jsonl and report.html; None where nothing was written."""

    @property
    def rows(self) -> list[Row]:
        """One row for each strategy: values over the seeds, and the difference to the control."""
        return rows(self.cells, self.control)

    def to_html(self, path: str | Path) -> None:
        """Write the report, one page that needs nothing else, to the file `path`."""
        report.write_html(self.cells, self.control, Path(path))

    def __str__(self) -> str:
        return report.text(self.cells, self.control)

    def _repr_html_(self) -> str:
        return report.html_table(self.cells, self.control)


def compare(
    *,
    strategies: Mapping[str, Spec] | Sequence[str],
    workload: str | None = None,
    model: Callable[..., Any] | None = None,
    train: Source = None,
    validation: Source = None,
    seeds: int | Sequence[int] = 3,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: Any = None,
    loss: Any = None,
    metric: Any = None,
    attack: Attack | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Train one model by several strategies, from the same weights on the same data, and compare.

    Strategies and options are checked before data are read. A strategy that fails in training is a
    row with its reason. `standard` is the control, and added where it is missing. The global random
    seeds of Python, NumPy and Keras are set for each run.

    Args:
        strategies: names; or a mapping from labels to what `trainstep.apply` takes: a name, a list of
            names, or a mapping from names to options.
        workload: one of `trainstep.benchmarks.workload.names()`; then `model`, `train` and `validation`
            are left out, and what is not given is as the workload has it.
        model: a function without arguments, or with one called `seed`, that returns a new
            `keras.Model`, not compiled.
        train: (x, y) or (x, y, sample_weight), arrays or structures of arrays with the examples along
            the first axis; or a batched `tf.data.Dataset` that ends. Arrays are shuffled for each epoch,
            alike for all strategies; a dataset is iterated as it is, so give its `shuffle` a seed.
        validation: the same; never shuffled.
        seeds: how many, counted from 0, or which.
        epochs: passes over the training data; 10 without a workload.
        batch_size: examples a step, for arrays; 32 without a workload.
        optimizer: a name, an optimizer to be copied, or a function that returns a new one; "adam".
        loss: as in `keras.Model.compile`; "sparse_categorical_crossentropy".
        metric: a name, a metric to be copied, or a function that returns a new one; "accuracy".
        attack: budget of the attack for the robust accuracy: `Attack`, or a mapping with at least
            "epsilon" in units of the input. None: that of the workload, and none without one.
        output: folder for results.jsonl, a line as soon as a run ends, and report.html. Where it holds
            results already they stay, and these go to a new folder inside, named by date and time.
        progress: show a progress bar; None: where the error stream is a terminal.

    Returns:
        The comparison, with one cell for each strategy and seed.

    Raises:
        InvalidComparisonError, InvalidDataError, MissingDataError, NotAModelError: the arguments, the data
            or the model are wrong.
        UnknownWorkloadError: there is no workload of that name.
        UnknownStrategyError, InvalidOptionsError, RepeatedStrategyError, StrategyConflictError,
            InvalidSpecError: the strategies or the attack are.
    """
    compositions, control = request.compositions(strategies)
    chosen = request.seeds(seeds)
    given = request.changes(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, loss=loss, metric=metric, attack=attack
    )
    if workload is not None:
        if model is not None or train is not None or validation is not None:
            raise InvalidComparisonError("Give a workload, or your own model, train and validation, but not both.")
        task = request.task_of_workload(workloads.get(workload), given)
    elif model is None or train is None or validation is None:
        raise InvalidComparisonError(
            f"Give model=, train= and validation=, or workload= with one of: {', '.join(workloads.names())}."
        )
    else:
        task = request.task_of_user(model, train, validation, given)
    folder = None if output is None else free_folder(Path(output))
    settings = request.settings(workload or "own model and data", task)
    trainers = {label: Trainer(task, composition) for label, composition in compositions.items()}
    cells = []
    with Progress(total=len(compositions) * len(chosen) * task.epochs, shown=progress) as bar:
        for cell in _cells(trainers, settings, control, chosen, bar):
            cells.append(cell)
            if folder is not None:
                write_line(folder / "results.jsonl", cell)
    comparison = Comparison(tuple(cells), control, folder)
    if folder is not None:
        comparison.to_html(folder / "report.html")
    return comparison


def _cells(
    trainers: dict[str, Trainer], settings: Settings, control: str, seeds: list[int], bar: Progress
) -> Iterator[Cell]:
    bar.say("cost of a step")
    costs, failures = measure_costs(trainers, control=control, seed=seeds[0])
    where = environment()
    for seed in seeds:
        for label, trainer in trainers.items():
            bar.say(f"{label}, seed {seed}")
            cell = Cell(
                label=label,
                spec=trainer.spec,
                seed=seed,
                cost=costs.get(label),
                not_costed=failures.get(label),
                settings=settings,
                environment=where,
            )
            cell = run_cell(trainer, cell, bar.advance)
            bar.advance(settings.epochs - len(cell.metrics))  # What a run that failed leaves out.
            yield cell
