"""The catalogue: one strategy, one file, one line here."""

from trainstep.strategies.adversarial import Adversarial as Adversarial
from trainstep.strategies.diagnostics import Diagnostics as Diagnostics
from trainstep.strategies.gradient_accumulation import GradientAccumulation as GradientAccumulation
from trainstep.strategies.gradient_clipping import GradientClipping as GradientClipping
from trainstep.strategies.micro_batches import MicroBatches as MicroBatches
from trainstep.strategies.mixed_precision import MixedPrecision as MixedPrecision
from trainstep.strategies.skip_nonfinite import SkipNonfinite as SkipNonfinite
from trainstep.strategies.standard import Standard as Standard
