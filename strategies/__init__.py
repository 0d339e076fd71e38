"""The catalogue: one strategy, one file, one line here."""

from trainstep.strategies.adaptive_gradient_clipping import AdaptiveGradientClipping as AdaptiveGradientClipping
from trainstep.strategies.adversarial import Adversarial as Adversarial
from trainstep.strategies.confidence_penalty import ConfidencePenalty as ConfidencePenalty
from trainstep.strategies.diagnostics import Diagnostics as Diagnostics
from trainstep.strategies.dp_sgd import DpSgd as DpSgd
from trainstep.strategies.ema import Ema as Ema
from trainstep.strategies.gradient_accumulation import GradientAccumulation as GradientAccumulation
from trainstep.strategies.gradient_centralization import GradientCentralization as GradientCentralization
from trainstep.strategies.gradient_clipping import GradientClipping as GradientClipping
from trainstep.strategies.gradient_noise import GradientNoise as GradientNoise
from trainstep.strategies.gradient_penalty import GradientPenalty as GradientPenalty
from trainstep.strategies.layer_freezing import LayerFreezing as LayerFreezing
from trainstep.strategies.layerwise_learning_rates import LayerwiseLearningRates as LayerwiseLearningRates
from trainstep.strategies.lookahead import Lookahead as Lookahead
from trainstep.strategies.micro_batches import MicroBatches as MicroBatches
from trainstep.strategies.mixed_precision import MixedPrecision as MixedPrecision
from trainstep.strategies.percentile_clipping import PercentileClipping as PercentileClipping
from trainstep.strategies.recompute import Recompute as Recompute
from trainstep.strategies.sam import Sam as Sam
from trainstep.strategies.skip_nonfinite import SkipNonfinite as SkipNonfinite
from trainstep.strategies.standard import Standard as Standard
from trainstep.strategies.swa import Swa as Swa
