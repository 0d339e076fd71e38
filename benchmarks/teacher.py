"""A teacher for `distillation`: the model of a workload, trained plainly and saved, for experiments that name its file.

    python -m trainstep.benchmarks.teacher digits_cnn --epochs 30 --output results/digits_cnn.keras

The same command makes the same model on the same machine, up to the order in which threads add.
"""

import argparse
import sys
from pathlib import Path

import keras

from trainstep.benchmarks.environment import environment
from trainstep.benchmarks.errors import InvalidComparisonError
from trainstep.benchmarks.records import Run
from trainstep.benchmarks.request import CONTROL, suite_of
from trainstep.benchmarks.runner import Bench, Trainer, run_seed
from trainstep.composition import remove
from trainstep.errors import TrainstepError


def taught(name: str, *, epochs: int | None = None, seed: int = 0) -> tuple[keras.Model, Run]:
    """Return the model of a workload, trained and plain, and what its run measured.

    Args:
        name: of the workload, which gives all but the seed.
        epochs: passes over the training examples; None: those of the workload.
        seed: of initial weights, order and dropout, as in a comparison.

    Raises:
        UnknownWorkloadError: there is no workload of that name.
        InvalidComparisonError: training failed, as its data are not there, for example.
    """
    suite = suite_of(workload=name, strategies=[CONTROL], epochs=epochs, attack=False)
    [task], [composition] = suite.tasks.values(), suite.compositions.values()
    trainer = Trainer(Bench(task), composition)
    run = run_seed(trainer, CONTROL, seed, environment())
    if run.failure:
        raise InvalidComparisonError(f"{name} could not be trained: {run.failure}.")
    return remove(trainer.model), run


def main(arguments: list[str] | None = None) -> int:
    """Train and save a teacher; 2 where what is asked for is wrong, or fails."""
    parser = argparse.ArgumentParser(description="Train the model of a workload, and save it as a teacher.")
    parser.add_argument("workload", help="one of `trainstep list`")
    parser.add_argument("--epochs", type=int, help="passes over the data; those of the workload")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order; 0")
    parser.add_argument("--output", type=Path, required=True, help="the file, .keras")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".keras":
        parser.error(f"--output is a file of Keras, .keras, not {str(options.output)!r}")
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs is at least 1, not {options.epochs}")
    if options.seed < 0:
        parser.error(f"--seed is at least 0, not {options.seed}")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"nothing can be written to --output: {error}")
    try:
        model, run = taught(options.workload, epochs=options.epochs, seed=options.seed)
    except TrainstepError as error:
        print(error, file=sys.stderr)
        return 2
    model.save(options.output)
    print(f"{options.output}: {options.workload}, {run.settings.metrics[0]} {run.metric:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
