"""What can be wrong with a comparison, besides its strategies."""

from trainstep.errors import TrainstepError


class UnknownWorkloadError(TrainstepError):
    """There is no workload of the name that was given."""


class InvalidComparisonError(TrainstepError):
    """The arguments of `compare` are wrong, leave something out, or contradict each other."""

    path: tuple[str, ...] = ()
    """Where in what was given the mistake is, as far as that is known."""


class UnknownArgumentError(InvalidComparisonError, TypeError):
    """`compare` has no argument of that name, or was given one without a name."""


class InvalidModelError(InvalidComparisonError):
    """The function of a user's own model fails, or what it returns cannot be compared, or does not fit the data."""


class InvalidExperimentError(InvalidComparisonError):
    """A file, or a mapping, that describes an experiment is wrong; the message gives the line of each mistake."""


class InvalidDataError(TrainstepError):
    """The data, or a file of results, are not of the form asked for."""


class MissingDataError(TrainstepError):
    """The data of a workload are not on this machine and cannot be downloaded."""


class StoreError(TrainstepError):
    """A file is no store of results, is one of a newer version, or cannot be written."""


class WorkerDiedError(RuntimeError):
    """The process of a run ended before the run did. Recorded as the reason in a result, not raised to the user."""


class OutOfTimeError(RuntimeError):
    """A run took longer than its limit. Recorded as the reason in a result, not raised to the user."""


class DivergedError(ArithmeticError):
    """The training loss is no longer a finite number. Recorded as the reason in a result, not raised to the user."""
