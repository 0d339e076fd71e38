"""What differentially private updates add up to: epsilon, for a delta."""

import importlib
import importlib.util
import logging
import warnings
from typing import Any

from pydantic import Field

from trainstep.declaration import StrategyOptions, validated_options
from trainstep.errors import InvalidOptionsError


class _Spending(StrategyOptions):
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    sampling_probability: float = Field(gt=0, le=1)
    updates: int = Field(ge=0)
    delta: float = Field(gt=0, lt=1)


def epsilon(*, noise_multiplier: float, sampling_probability: float, updates: int, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after so many updates.

    It is that of batches in which each example is, in each update anew, with `sampling_probability`: Poisson sampling.
    Keras shuffles and takes each example once an epoch, for which no bound as tight is known; the number is what
    everybody reports all the same. By dp-accounting, with Renyi differential privacy; two sets of data are neighbours
    where one has an example more.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the norm that examples are clipped to.
        sampling_probability: share of the examples that is in a batch, above 0 and up to 1.
        updates: how many.
        delta: probability that the bound does not hold, between 0 and 1.

    Raises:
        InvalidOptionsError: a number is out of its range.
    """
    given = {"noise_multiplier": noise_multiplier, "sampling_probability": sampling_probability}
    validated_options("epsilon", _Spending, {**given, "updates": updates, "delta": delta})
    if not updates:
        return 0.0
    dp_accounting = importlib.import_module("dp_accounting")
    event = dp_accounting.PoissonSampledDpEvent(sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant = dp_accounting.rdp.RdpAccountant()
    log = logging.getLogger("absl")
    log.addFilter(_is_of_note)
    try:
        accountant.compose(event, updates)
    finally:
        log.removeFilter(_is_of_note)
    return float(accountant.get_epsilon(delta))


def _is_of_note(record: logging.LogRecord) -> bool:
    # It tries many orders of the Renyi divergence and takes the best; each that it leaves out is a line in the log.
    return "Excluding this order" not in str(record.msg)


def spent_by(model: Any, *, num_examples: int, delta: float) -> float:
    """Return the `epsilon` of the updates of `model` since it was compiled, as if all were of its largest batch."""
    state = model.strategy_state["dp_sgd"]
    updates, largest = int(state["updates"].numpy()), float(state["largest"].numpy())
    if not updates:
        return 0.0
    if largest > num_examples:
        warnings.warn(
            f"dp_sgd: a batch had {largest:.0f} loss terms, more than num_examples={num_examples}: epsilon is that of "
            "batches of all examples. Give the number of those you train on.",
            stacklevel=2,
        )
    return epsilon(
        noise_multiplier=model.strategy_options["dp_sgd"].noise_multiplier,
        sampling_probability=min(1.0, largest / num_examples),
        updates=updates,
        delta=delta,
    )


def check_installed() -> None:
    """Raise `InvalidOptionsError` where there is no accountant to ask."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise InvalidOptionsError('dp_sgd: num_examples needs dp-accounting: pip install "trainstep[privacy]".')
