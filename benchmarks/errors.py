"""What can be wrong with a comparison, besides its strategies."""

from trainstep.errors import TrainstepError


class UnknownWorkloadError(TrainstepError):
    """There is no workload of the name that was given."""


class InvalidComparisonError(TrainstepError):
    """The arguments of `compare` leave something out, or contradict each other."""


class InvalidDataError(TrainstepError):
    """The data, or a file of results, are not of the form asked for."""


class MissingDataError(TrainstepError):
    """The data of a workload are not on this machine and cannot be downloaded."""


class DivergedError(ArithmeticError):
    """The training loss is no longer a finite number. Recorded as the reason in a result, not raised to the user."""
