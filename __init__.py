"""trainstep: a pluggable catalogue of training strategies for Keras on TensorFlow."""

from trainstep.composition import applied, apply, model_class, remove
from trainstep.declaration import StrategyOptions
from trainstep.registry import get, names, register
from trainstep.step import Strategy
from trainstep.strategies import (
    Adversarial,
    GradientAccumulation,
    GradientClipping,
    MixedPrecision,
    Standard,
)

__version__ = "0.1.0"
