"""Progressive resizing: begin with small images, and let them grow.

    side' = scale * side, to a multiple of `size_increment`        bilinear; scale: a schedule in updates

A convolution of images half as wide and half as high is a quarter of the work. The size is a number of the step, not of
its trace: nothing is traced anew when it changes, and XLA, which needs to know it, cannot compile the step. The model
has to take images of any size and make the same of them: convolutions, and a global pooling before the first dense
layer. Batch norm sees the images as they are resized; dropout is as without it. Validation and prediction are at full
size.

Howard, "Training Imagenet in 3 hours for $25", fast.ai 2018, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html;
after the growing images of Karras et al., "Progressive Growing of GANs", ICLR 2018, https://arxiv.org/abs/1710.10196
"""

import weakref
from typing import Annotated, Any

import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import Cost, Declaration, Stage, StrategyOptions
from trainstep.errors import ModelConflictError
from trainstep.registry import register
from trainstep.schedules import Schedule, Scheduled, Within, highest, is_always, lowest, value_at
from trainstep.step import Batch, Evaluation, Strategy
from trainstep.strategies._images import images_among, size_of

_checked: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


class ProgressiveResizingOptions(StrategyOptions):
    """How large images are, and when."""

    scale: Annotated[Scheduled, Within(gt=0, le=1)] = Field(
        default=Schedule(start=0.5, end=1.0, updates=1000),
        description="Height and width of what is trained on, as a share of those of the images; 1: all of them.",
    )
    size_increment: int = Field(
        default=1, ge=1, le=1024, description="Pixels that height and width are multiples of, below full size."
    )


def resized_to(size: tf.Tensor, scale: float | tf.Tensor, size_increment: int) -> tf.Tensor:
    """Return the height and width, of `size` at full scale, that images have at `scale`: int32 (2,)."""
    wanted = tf.round(scale * tf.cast(size, tf.float32) / size_increment)
    within = tf.clip_by_value(tf.cast(wanted, tf.int32) * size_increment, size_increment, size)
    return tf.where(tf.equal(scale, 1.0), size, tf.minimum(within, size))


def resized(images: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Return `images`, (batch, height, width, channels), in this height and width; whole numbers as float32."""
    values = tf.image.resize(images, size)
    return tf.cast(values, images.dtype) if images.dtype.is_floating else values


@register
class ProgressiveResizing(Strategy):
    """Resizes the batch; what follows in the step, metrics too, sees it as small as it is then."""

    declaration = Declaration(
        name="progressive_resizing",
        stage=Stage.BATCH,
        summary="Begin with small images, and let them grow.",
        reference="Howard, fast.ai 2018, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html",
        options=ProgressiveResizingOptions,
        neutral={"scale": 1.0},
        needs=("images", "images of any size"),
        notes={
            "adversarial": "the attack is on images as they are resized, and its radius is in units of their pixels",
            "cutmix": "boxes are pasted at full size, and resized with the images",
            "cutout": "squares are hidden at full size, and resized with the images",
            "gradient_accumulation": "the schedule counts windows",
            "selective_backprop": "it looks at the images at full size, and chooses which are resized",
        },
        passes_through=lambda options: ("transform_batch", "train_batch") if is_always(options.scale, 1) else (),
        cost=lambda options: Cost(
            time=highest(options.scale) ** 2,
            batch_norm="none" if is_always(options.scale, 1) else "statistics of resized images",
            saves=f"at most {highest(options.scale) ** 2:.2f} of the pixels" if highest(options.scale) < 1 else "",
        ),
        without_xla=lambda options: (
            "" if is_always(options.scale, 1) else "images change their size, which XLA needs to know"
        ),
    )

    def transform_batch(self, batch: Batch) -> Batch:
        options = self.strategy_options["progressive_resizing"]
        if is_always(options.scale, 1):
            return super().transform_batch(batch)
        tensors, places = tf.nest.flatten(batch.x), images_among("progressive_resizing", batch.x)
        _seam.ensure_built(self, batch.x)
        known, asked = _checked.setdefault(self, set()), (options, *(tuple(tensor.shape[1:]) for tensor in tensors))
        if asked not in known:
            _check_takes_any_size(self, batch.x, places, options)
            known.add(asked)
        scale = value_at(options.scale, self.optimizer.iterations)
        for place in places:
            size = resized_to(size_of(tensors[place]), scale, options.size_increment)
            tensors[place] = resized(tensors[place], size)
        with _seam.of_any_size(self):
            return super().transform_batch(batch._replace(x=tf.nest.pack_sequence_as(batch.x, tensors)))

    def train_batch(self, batch: Batch) -> Evaluation:
        if is_always(self.strategy_options["progressive_resizing"].scale, 1):
            return super().train_batch(batch)
        with _seam.of_any_size(self):
            return super().train_batch(batch)


def _check_takes_any_size(model: Any, x: Any, places: list[int], options: ProgressiveResizingOptions) -> None:
    """Raise `ModelConflictError` where `model` does not take the smallest images, or makes something else of them."""
    full = [tuple(tensor.shape) for tensor in tf.nest.flatten(x)]
    if any(None in full[place][1:] for place in places):
        return  # They are of different sizes already.
    small = list(full)
    for place in places:
        with tf.init_scope():
            size = resized_to(tf.constant(full[place][1:3]), lowest(options.scale), options.size_increment)
        small[place] = (full[place][0], *(int(side) for side in size.numpy()), full[place][3])
    of_full = _seam.shapes_of_outputs(model, x, full)
    try:
        of_small, why = _seam.shapes_of_outputs(model, x, small), ""
    except ValueError as error:
        of_small, why = None, f" Keras says: {str(error).splitlines()[0]}"
    if of_small != of_full:
        outcome = (
            "cannot be called on them" if of_small is None else f"makes {of_small} of them, and {of_full} of others"
        )
        raise ModelConflictError(
            f"progressive_resizing makes images of {small[places[0]][1:]} out of {full[places[0]][1:]}, and the model "
            f"{model.name!r} {outcome}. Use global pooling, keras.layers.GlobalAveragePooling2D, in place of Flatten, "
            f"for outputs that do not depend on the size of images.{why}"
        )
