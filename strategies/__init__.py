"""The catalogue: one strategy, one file, one line here."""

from trainstep.strategies.adversarial import Adversarial
from trainstep.strategies.gradient_accumulation import GradientAccumulation
from trainstep.strategies.gradient_clipping import GradientClipping
from trainstep.strategies.mixed_precision import MixedPrecision
from trainstep.strategies.standard import Standard

__all__ = [
    "Adversarial",
    "GradientAccumulation",
    "GradientClipping",
    "MixedPrecision",
    "Standard",
]
