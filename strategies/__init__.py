"""The catalogue: one strategy, one file, one line here."""

from trainstep.strategies.adaptive_gradient_clipping import AdaptiveGradientClipping as AdaptiveGradientClipping
from trainstep.strategies.adversarial import Adversarial as Adversarial
from trainstep.strategies.adversarial_weight_perturbation import (
    AdversarialWeightPerturbation as AdversarialWeightPerturbation,
)
from trainstep.strategies.confidence_penalty import ConfidencePenalty as ConfidencePenalty
from trainstep.strategies.cutmix import Cutmix as Cutmix
from trainstep.strategies.cutout import Cutout as Cutout
from trainstep.strategies.diagnostics import Diagnostics as Diagnostics
from trainstep.strategies.distillation import Distillation as Distillation
from trainstep.strategies.dp_sgd import DpSgd as DpSgd
from trainstep.strategies.ema import Ema as Ema
from trainstep.strategies.free_adversarial import FreeAdversarial as FreeAdversarial
from trainstep.strategies.gradient_accumulation import GradientAccumulation as GradientAccumulation
from trainstep.strategies.gradient_centralization import GradientCentralization as GradientCentralization
from trainstep.strategies.gradient_clipping import GradientClipping as GradientClipping
from trainstep.strategies.gradient_noise import GradientNoise as GradientNoise
from trainstep.strategies.gradient_penalty import GradientPenalty as GradientPenalty
from trainstep.strategies.gradnorm import Gradnorm as Gradnorm
from trainstep.strategies.gsam import Gsam as Gsam
from trainstep.strategies.label_smoothing import LabelSmoothing as LabelSmoothing
from trainstep.strategies.layer_freezing import LayerFreezing as LayerFreezing
from trainstep.strategies.layerwise_learning_rates import LayerwiseLearningRates as LayerwiseLearningRates
from trainstep.strategies.look_sam import LookSam as LookSam
from trainstep.strategies.lookahead import Lookahead as Lookahead
from trainstep.strategies.mart import Mart as Mart
from trainstep.strategies.micro_batches import MicroBatches as MicroBatches
from trainstep.strategies.mixed_precision import MixedPrecision as MixedPrecision
from trainstep.strategies.mixup import Mixup as Mixup
from trainstep.strategies.pcgrad import Pcgrad as Pcgrad
from trainstep.strategies.percentile_clipping import PercentileClipping as PercentileClipping
from trainstep.strategies.progressive_resizing import ProgressiveResizing as ProgressiveResizing
from trainstep.strategies.r_drop import RDrop as RDrop
from trainstep.strategies.recompute import Recompute as Recompute
from trainstep.strategies.sam import Sam as Sam
from trainstep.strategies.selective_backprop import SelectiveBackprop as SelectiveBackprop
from trainstep.strategies.skip_nonfinite import SkipNonfinite as SkipNonfinite
from trainstep.strategies.standard import Standard as Standard
from trainstep.strategies.swa import Swa as Swa
from trainstep.strategies.trades import Trades as Trades
from trainstep.strategies.virtual_adversarial import VirtualAdversarial as VirtualAdversarial
