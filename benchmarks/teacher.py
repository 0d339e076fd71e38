"""A teacher for `distillation`: the model of a workload, trained plainly and saved, for experiments that name its file.

    python -m trainstep.benchmarks.teacher digits_cnn --epochs 30 --output results/digits_cnn.keras

The same command makes the same model on the same machine, up to the order in which threads add.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import keras

from trainstep.benchmarks import optimizers, workload
from trainstep.benchmarks.data import train_batches, validation_batches
from trainstep.errors import TrainstepError


def taught(chosen: workload.Workload, *, epochs: int, seed: int = 0) -> tuple[keras.Model, float]:
    """Return the model of the workload `chosen`, trained and compiled, and its first metric on the validation examples.

    Args:
        chosen: gives model, data, optimizer, loss and metrics.
        epochs: passes over the training examples, at least 1.
        seed: of initial weights, order and dropout, as in a comparison.

    Raises:
        MissingDataError: the data are not there.
    """
    keras.utils.set_random_seed(seed)
    split = chosen.read()
    model: Any = chosen.build(seed)
    batches = train_batches(split.train, seed=seed, epochs=epochs, batch_size=chosen.batch_size)
    optimizer = optimizers.make(chosen.optimizer, epochs * (batches.steps_per_epoch or 0))
    model.compile(optimizer, chosen.loss, metrics=list(chosen.metrics))
    validation = validation_batches(split.validation, chosen.batch_size)
    history = model.fit(
        batches.dataset,
        steps_per_epoch=batches.steps_per_epoch,
        epochs=epochs,
        validation_data=validation,
        shuffle=False,  # The order is made already.
        verbose=0,
    )
    return model, float(history.history[f"val_{chosen.metrics[0]}"][-1])


def main(arguments: list[str] | None = None) -> int:
    """Train and save a teacher; 2 where what is asked for is wrong."""
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
    try:
        chosen = workload.get(options.workload)
        model, reached = taught(chosen, epochs=options.epochs or chosen.epochs, seed=options.seed)
    except TrainstepError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.output)
    print(f"{options.output}: {chosen.name}, {chosen.metrics[0]} {reached:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
