"""Mixed precision: compute in 16 bits, keep the weights in 32.

    bfloat16:   as it is: its range is that of float32
    float16:    g = grad(scale * loss) / scale                     so that small gradients do not vanish
                not finite: skip the update, scale = scale / 2     not below min_scale
                finite `growth_interval` times: scale = 2 * scale  not above max_scale

Activations and their memory halve; a step takes less time than in float32 where the hardware
multiplies in 16 bits, and more where it emulates them. Applies to a model already built; outputs and
variables stay float32.

Micikevicius et al., "Mixed Precision Training", ICLR 2018, https://arxiv.org/abs/1710.03740
"""

import warnings
import weakref
from typing import Any, Literal

import tensorflow as tf
from pydantic import Field, field_validator, model_validator

from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.gradients import all_finite
from trainstep.registry import register
from trainstep.replicas import assign, conditional
from trainstep.step import Batch, Evaluation, Strategy, Update
from trainstep.strategies import _dtype_policies, _skips

_ADVICE = "Keep the strategy, whose scale has a floor and a cap, and pass the plain optimizer, without its own scaling."


class MixedPrecisionOptions(StrategyOptions):
    """The compute dtype, and the loss scale that float16 needs."""

    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        default="auto",
        validate_default=True,
        description="Compute dtype; auto, decided at once: bfloat16 on CPUs, TPUs and GPUs that have it, else float16.",
    )
    initial_scale: float = Field(
        default=2.0**15, gt=0, allow_inf_nan=False, description="Loss scale of the first step."
    )
    growth_interval: int = Field(default=2000, ge=1, description="Updates in a row after which the scale doubles.")
    min_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="Floor of the loss scale.")
    max_scale: float = Field(default=2.0**24, gt=0, allow_inf_nan=False, description="Cap of the loss scale.")
    max_consecutive_skips: int = Field(default=50, ge=1, description="Skipped updates in a row that stop training.")

    @field_validator("dtype")
    @classmethod
    def _decided(cls, dtype: str) -> str:
        # Now, so that a plan says what will run, and a file loaded on another machine finds the state it holds.
        return _dtype_policies.fastest_dtype() if dtype == "auto" else dtype

    @model_validator(mode="after")
    def _ordered(self) -> "MixedPrecisionOptions":
        if not self.min_scale <= self.initial_scale <= self.max_scale:
            raise ValueError(
                f"min_scale <= initial_scale <= max_scale must hold, not "
                f"{self.min_scale} <= {self.initial_scale} <= {self.max_scale}"
            )
        return self


_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def next_scale(scale: tf.Tensor, finite_steps: tf.Tensor, options: MixedPrecisionOptions) -> tf.Tensor:
    """Return the scale after `finite_steps` finite updates in a row; 0 of them means the last one was not."""
    grown = tf.where(finite_steps >= options.growth_interval, scale * 2, scale)
    return tf.clip_by_value(tf.where(finite_steps > 0, grown, scale / 2), options.min_scale, options.max_scale)


def _explanation(options: MixedPrecisionOptions) -> str:
    return (
        f"mixed_precision: the gradient was not finite {options.max_consecutive_skips} updates in a row "
        f"(max_consecutive_skips), though the loss scale had fallen towards {options.min_scale} (min_scale). Look for "
        "NaN or infinity in the data or the loss, lower the learning rate, or train with dtype='bfloat16'."
    )


@register
class MixedPrecision(Strategy):
    """Sets the layers' dtype policies while it is applied; under float16 checks each update and scales the loss."""

    declaration = Declaration(
        name="mixed_precision",
        stage=Stage.LOSS_SCALING,
        summary="Compute in bfloat16 or float16, keep the weights in float32.",
        reference="Micikevicius et al., ICLR 2018, https://arxiv.org/abs/1710.03740",
        options=MixedPrecisionOptions,
        neutral=None,
        why_not_neutral="every setting computes in 16 bits; not to apply it is the null option",
        replaces={"LossScaleOptimizer": _ADVICE, "loss_scale_factor": _ADVICE},
        passes_through=lambda options: () if options.dtype == "float16" else ("update_weights", "report_metrics"),
        cost=lambda options: Cost(
            time=1.0, memory="activations in half the bytes", batch_norm="none: statistics are kept in float32"
        ),
        state=lambda options: (
            {
                "scale": Slot(initial=options.initial_scale),
                "finite_steps": Slot(dtype="int32"),
                "skips": Slot(dtype="int32"),
            }
            if options.dtype == "float16"
            else {}
        ),
        reports=lambda options: (
            {"loss_scale": Report(over="last"), "skipped_updates": Report(over="sum")}
            if options.dtype == "float16"
            else {}
        ),
    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tf.nest.map_structure(_dtype_policies.as_float32, super().__call__(*args, **kwargs))

    @property
    def losses(self) -> list[Any]:
        # Keras sums them with the float32 loss of the outputs; Keras 3 fails on one from a layer in 16 bits.
        return [_dtype_policies.as_float32(loss) for loss in super().losses]

    def loss_scale(self) -> tf.Tensor | None:
        state = self.strategy_state["mixed_precision"]
        return tf.convert_to_tensor(state["scale"]) if state else None

    def update_weights(self, update: Update) -> None:
        options, state = self.strategy_options["mixed_precision"], self.strategy_state["mixed_precision"]
        hand_on = super().update_weights
        if not state:  # bfloat16
            hand_on(update)
            return

        def record(finite_steps: tf.Tensor, skips: Any) -> None:
            full = finite_steps >= options.growth_interval
            scale = next_scale(tf.convert_to_tensor(state["scale"]), finite_steps, options)
            values = {"scale": scale, "finite_steps": tf.where(full, 0, finite_steps), "skips": skips}
            assign([(state[name], value) for name, value in values.items()])

        def apply(update: Update) -> None:
            hand_on(update)
            skips = _skips.after_update(state["skips"], options.max_consecutive_skips)
            record(tf.convert_to_tensor(state["finite_steps"]) + 1, skips)

        def skip(update: Update) -> None:
            del update
            self.record("skipped_updates", lambda: tf.ones(()))
            record(
                tf.constant(0), _skips.after_skip(state["skips"], options.max_consecutive_skips, _explanation(options))
            )

        conditional(all_finite(update.gradients), apply, skip, (update,))

    def report_metrics(self, batch: Batch, evaluation: Evaluation) -> dict[str, Any]:
        state = self.strategy_state["mixed_precision"]
        if state:
            self.record("loss_scale", lambda: tf.convert_to_tensor(state["scale"]))
        return super().report_metrics(batch, evaluation)

    def check_progress(self) -> None:
        super().check_progress()
        options, state = self.strategy_options["mixed_precision"], self.strategy_state["mixed_precision"]
        if state:
            _skips.check(state["skips"], options.max_consecutive_skips, _explanation(options))

    def check_model(self) -> None:
        super().check_model()
        _dtype_policies.check(self, self.strategy_options["mixed_precision"].dtype)

    def attach_strategies(self) -> None:
        super().attach_strategies()
        dtype = self.strategy_options["mixed_precision"].dtype
        if dtype == "float16" and self not in _warned and not tf.config.list_physical_devices("GPU"):
            _warned.add(self)
            warnings.warn(
                "mixed_precision computes in float16, which CPUs emulate: a step can take many times as long as in "
                "float32. Use dtype='bfloat16' on a CPU.",
                stacklevel=3,
            )
        _dtype_policies.attach(self, dtype)

    def detach_strategies(self) -> None:
        super().detach_strategies()
        _dtype_policies.detach(self)
