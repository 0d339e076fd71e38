"""How robust a trained model is, and whether the number is to be believed.

    robust accuracy = share of examples classified rightly both as they are and wherever an attack has ended

The attack climbs the cross-entropy within the ball around each example, from several random points. What it finds is
an upper bound of the true robust accuracy: a model may only hide its gradients from it. So the report also has a
weaker attack, noise, smaller and larger balls and the share of zero gradients, and warns where they contradict:
these are the signs of Athalye et al., section 3.1.

Madry et al., ICLR 2018, https://arxiv.org/abs/1706.06083; Athalye et al., "Obfuscated Gradients Give a False Sense of
Security", ICML 2018, https://arxiv.org/abs/1802.00420
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from pydantic import Field

from trainstep import _seam
from trainstep.declaration import StrategyOptions, validated_options
from trainstep.errors import ModelConflictError, NotAModelError, UnsupportedInputError
from trainstep.gradients import differentiate
from trainstep.step import Strategy
from trainstep.strategies._attacks import ClipRange, attack, attackable, check_range
from trainstep.strategies._balls import Norm, step_length
from trainstep.strategies._classes import Classes, class_outputs

_TOLERANCE = 0.01
"""Share of the examples by which one accuracy may be on the wrong side of another, by luck of the draw."""
_GROWING = (0.5, 2.0, 4.0)
"""Radii the attack is tried at besides epsilon, as parts of it."""


class Budget(StrategyOptions):
    """What the attack may do; all lengths in units of the input."""

    attack: Literal["pgd", "fgsm"] = Field(default="pgd", description="Several steps, or one, from the example itself.")
    epsilon: float = Field(gt=0, allow_inf_nan=False, description="Radius of the ball, in units of the input.")
    norm: Norm = Field(default="linf", description="The ball's norm, over each example by itself.")
    steps: int = Field(default=40, ge=1, description="Gradients taken from each start.")
    step_size: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Length of one step; None: 2.5 epsilon / steps."
    )
    restarts: int = Field(default=5, ge=1, description="Random starts; one that succeeds breaks the example.")
    clip_range: ClipRange = None
    batch_size: int = Field(default=128, ge=1, description="Examples attacked at once.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the random starts and of the noise.")

    def at(self, epsilon: float) -> "Budget":
        """Return the same attack in a ball of radius `epsilon`, its step in proportion."""
        size = None if self.step_size is None else self.step_size * epsilon / self.epsilon
        return self.model_copy(update={"epsilon": epsilon, "step_size": size})

    def __str__(self) -> str:
        how = "FGSM" if self.attack == "fgsm" else f"PGD, {self.steps} steps, {self.restarts} random starts"
        values = "" if self.clip_range is None else f", inputs within [{self.clip_range[0]:g}, {self.clip_range[1]:g}]"
        return f"{how}, {self.norm} epsilon {self.epsilon:.4g}{values}"


@dataclass(frozen=True)
class Robustness:
    """What `evaluate_robustness` measured; accuracies are shares of the examples, from 0 to 1."""

    budget: Budget
    examples: int
    accuracy: float
    robust_accuracy: float
    fgsm_accuracy: float
    noise_accuracy: float
    by_epsilon: tuple[tuple[float, float], ...]
    """Radii and robust accuracies, growing; the last radius is the whole range of the inputs."""
    zero_gradients: float
    """Share of the examples whose loss does not depend on the input, to the last float."""
    warnings: tuple[str, ...]
    """Signs that the model hides its gradients, so that `robust_accuracy` is too high; none is no proof."""

    def __str__(self) -> str:
        curve = ", ".join(f"{epsilon:.4g}: {accuracy:.1%}" for epsilon, accuracy in self.by_epsilon)
        lines = [
            f"{self.budget}; {self.examples} examples",
            f"accuracy               {self.accuracy:.1%}",
            f"robust accuracy        {self.robust_accuracy:.1%}",
            f"under FGSM             {self.fgsm_accuracy:.1%}",
            f"under uniform noise    {self.noise_accuracy:.1%}",
            f"robust by epsilon      {curve}",
            f"zero input gradients   {self.zero_gradients:.1%}",
            *(f"WARNING: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def evaluate_robustness(
    model: Any,
    data: Any,
    *,
    attack: Literal["pgd", "fgsm"] = "pgd",
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 5,
    clip_range: tuple[float, float] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    from_logits: bool | None = None,
) -> Robustness:
    """Return how many examples a classifier gets right within a ball around them, and signs that it only seems so.

    The model stays as it is: weights, metrics, statistics and random state. One with strategies has the weights it is
    judged by.

    Args:
        model: any `keras.Model` whose one output is a score for each class, (batch, classes); or, of two classes, one.
        data: (x, y), arrays or tensors, or a `tf.data.Dataset` of batches of these; y are class numbers or one-hot.
        attack: "pgd" or "fgsm".
        epsilon: radius of the ball, in units of the input.
        norm: "linf" or "l2".
        steps: gradients taken from each start.
        step_size: length of one step; None: 2.5 epsilon / steps.
        restarts: random starts; one that succeeds breaks the example.
        clip_range: lowest and highest value of an input, (0, 1) for images; None: no limits.
        batch_size: examples attacked at once.
        seed: of the random starts and of the noise.
        from_logits: whether the output is logits; None: as the compiled loss says.

    Raises:
        InvalidOptionsError: a number is out of bounds.
        NotAModelError, UnsupportedInputError, ModelConflictError: what is given is no such model, or no such data.
    """
    if not isinstance(model, keras.Model):
        raise NotAModelError(f"`evaluate_robustness` takes a keras.Model, not {type(model).__name__} {model!r}.")
    given = {"attack": attack, "epsilon": epsilon, "norm": norm, "steps": steps, "step_size": step_size}
    given |= {"restarts": restarts, "clip_range": clip_range, "batch_size": batch_size, "seed": seed}
    budget = validated_options("evaluate_robustness", Budget, given)
    batches = _batches(data, budget.batch_size)
    with model.evaluation_weights() if isinstance(model, Strategy) else contextlib.nullcontext():
        attacked = _Attacked(model, batches, from_logits)
        attacked.check(budget)
        right = attacked.right()
        robust = attacked.withstanding(right, budget)
        fgsm = attacked.withstanding(right, budget.model_copy(update={"attack": "fgsm", "step_size": None}))
        noisy = attacked.right_in_noise(budget)
        whole = attacked.whole_range(budget)
        radii = [*(factor * budget.epsilon for factor in _GROWING if factor * budget.epsilon < whole), whole]
        curve = {radius: _share(attacked.withstanding(right, budget.at(radius))) for radius in radii}
        zero = _share(attacked.zero_gradients())
    curve = sorted((curve | {budget.epsilon: _share(robust)}).items())
    measured = (_share(robust), _share(fgsm), _share([a & b for a, b in zip(right, noisy, strict=True)]))
    return Robustness(
        budget,
        sum(len(each) for each in right),
        _share(right),
        *measured,
        by_epsilon=tuple(curve),
        zero_gradients=zero,
        warnings=tuple(masking_signs(*measured, by_epsilon=curve, zero_gradients=zero)),
    )


def masking_signs(
    robust: float, fgsm: float, noise: float, *, by_epsilon: Sequence[tuple[float, float]], zero_gradients: float
) -> list[str]:
    """Return what, in these accuracies, says that an attack by gradients is blind rather than the model robust.

    Args:
        robust: accuracy under the attack.
        fgsm: under one step.
        noise: under uniform noise in the same ball.
        by_epsilon: radii and robust accuracies, growing; the last radius is the whole range of the inputs.
        zero_gradients: share of the examples whose gradient is zero.
    """
    signs = []
    if fgsm < robust - _TOLERANCE:
        signs.append(f"one step (FGSM) breaks more than the attack: accuracy {fgsm:.1%} against {robust:.1%}.")
    if noise < robust - _TOLERANCE:
        signs.append(f"noise breaks more than the attack: accuracy {noise:.1%} against {robust:.1%}.")
    for (near, at_near), (far, at_far) in itertools.pairwise(by_epsilon):
        if at_far > at_near + _TOLERANCE:
            signs.append(f"a larger ball breaks less: {at_far:.1%} at {far:.4g} against {at_near:.1%} at {near:.4g}.")
    epsilon, left = by_epsilon[-1]
    if left > 5 * _TOLERANCE:
        signs.append(
            f"in a ball of the whole range of the inputs, {epsilon:.4g}, {left:.1%} withstand, and none could."
        )
    if zero_gradients > _TOLERANCE:
        signs.append(f"the gradient with respect to the input is zero for {zero_gradients:.1%} of the examples.")
    return signs


def _share(of_batches: Sequence[np.ndarray]) -> float:
    return float(np.mean(np.concatenate(of_batches)))


def _batches(data: Any, size: int) -> list[tuple[Any, Any]]:
    if isinstance(data, tf.data.Dataset):
        spec = data.element_spec
        if not (isinstance(spec, tuple) and len(spec) in (2, 3)):
            raise UnsupportedInputError(f"The dataset is to have batches (x, y), not elements of the form {spec}.")
        if any(tensor.shape.rank == 0 for tensor in tf.nest.flatten(spec)):
            raise UnsupportedInputError(f"The dataset is to have batches, and has single examples, {spec}. Batch it.")
        return [(x, y) for x, y in data.map(lambda x, y, *_: (x, y)).unbatch().batch(size)]
    if not (isinstance(data, (tuple, list)) and len(data) in (2, 3)):
        raise UnsupportedInputError(
            f"Data are (x, y), or a tf.data.Dataset of such batches, not {type(data).__name__}."
        )
    x, y = tf.nest.map_structure(tf.convert_to_tensor, (data[0], data[1]))
    counts = sorted({tensor.shape[0] for tensor in tf.nest.flatten((x, y))})
    if len(counts) > 1:
        raise UnsupportedInputError(f"Inputs and labels are of different numbers of examples: {counts}.")
    found = list(tf.data.Dataset.from_tensor_slices((x, y)).batch(size))
    if not found:
        raise UnsupportedInputError("There are no examples to attack.")
    return found


def _compiled_for(model: Any, scores: Any) -> Classes:
    try:
        [classes] = class_outputs("evaluate_robustness", model, scores)
    except ModelConflictError as error:
        raise ModelConflictError(f"{error} Or say what its scores are, from_logits=True or False.") from error
    return classes


class _Attacked:
    """A model and what it is attacked on, batch by batch; each question is answered by an array for each batch."""

    def __init__(self, model: Any, batches: list[tuple[Any, Any]], from_logits: bool | None) -> None:
        self._model, self._batches = model, batches
        scores = _seam.forward(model, batches[0][0], training=False)
        if not (isinstance(scores, tf.Tensor) and len(scores.shape) == 2):
            shape = getattr(scores, "shape", type(scores).__name__)
            raise UnsupportedInputError(
                "Robust accuracy needs a model with one score for each class as its only output, of shape "
                f"(batch, classes), not {shape}."
            )
        if from_logits is None:
            self._classes = _compiled_for(model, scores)
        else:
            self._classes = Classes(0, "binary" if scores.shape[1] == 1 else "categorical", from_logits)
        self._num_classes = max(int(scores.shape[1] or 0), 2)
        if not self._classes.from_logits and (least := float(tf.reduce_min(scores))) < 0:
            raise UnsupportedInputError(
                f"The scores of the model are as low as {least:.4g}, so they are logits, and are taken for "
                "probabilities. Say from_logits=True, and compile with a loss that is told so."
            )
        self._able = attackable(batches[0][0], model, None)
        self._log_probabilities = tf.function(self._traced_log_probabilities, reduce_retracing=True)
        self._attacks: dict[Any, Any] = {}

    def check(self, budget: Budget) -> None:
        """Raise `UnsupportedInputError` for inputs that are no numbers, or outside of the range, and for no labels."""
        for x, y in self._batches:
            check_range(x, budget.clip_range)
            self._check_form(y)
            numbers = self._numbers(y).numpy()
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self._num_classes:
                raise UnsupportedInputError(
                    f"The labels go from {numbers.min()} to {numbers.max()}, and the model has {self._num_classes} "
                    f"classes: 0 to {self._num_classes - 1}."
                )

    def _check_form(self, y: Any) -> None:
        if not isinstance(y, tf.Tensor) or len(y.shape) > 2 or {*y.shape[1:]} - {1, self._num_classes}:
            raise UnsupportedInputError(
                "Labels are the numbers of classes, (batch,) or (batch, 1), or one-hot, "
                f"(batch, {self._num_classes}), not {getattr(y, 'shape', type(y).__name__)}."
            )
        if y.dtype.is_floating and not np.array_equal(y, np.round(y)):
            raise UnsupportedInputError(f"Labels are whole numbers, not such as {y[0].numpy()}.")

    def right(self) -> list[np.ndarray]:
        """Tell which examples are classified rightly as they are."""
        return [self._hits(x, y) for x, y in self._batches]

    def withstanding(self, right: list[np.ndarray], budget: Budget) -> list[np.ndarray]:
        """Tell which of those that are `right` are so wherever the attack ends."""
        one_step = budget.attack == "fgsm"
        steps = 1 if one_step else budget.steps
        size = budget.step_size or (budget.epsilon if one_step else step_length(budget.epsilon, steps))
        lengths = tf.constant(budget.epsilon), tf.constant(size)  # Tensors: one trace is for balls of every radius.

        def moved(x: Any, y: tf.Tensor, seed: tf.Tensor, epsilon: tf.Tensor, step_size: tf.Tensor) -> Any:
            return attack(
                *(x, self._able, lambda moved: self._loss(moved, y), functools.partial(_gradients, self._model)),
                seed=None if one_step else seed,
                epsilon=epsilon,
                norm=budget.norm,
                steps=steps,
                step_size=step_size,
                clip_range=budget.clip_range,
            )

        kind = (budget.attack, budget.norm, steps, budget.clip_range)
        traced = self._attacks.setdefault(kind, tf.function(moved, reduce_retracing=True))
        left = []
        for index, ((x, y), hits) in enumerate(zip(self._batches, right, strict=True)):
            standing = hits.copy()
            for start in range(1 if one_step else budget.restarts):
                if not standing.any():
                    break
                # Only those that still stand: of a model that is not robust few have to be attacked again.
                x_left, y_left = tf.nest.map_structure(functools.partial(tf.boolean_mask, mask=standing), (x, y))
                # Two numbers a draw: the start in an L2 ball takes a second.
                draw = 2 * (index * budget.restarts + start)
                seed = tf.constant([budget.seed, draw])
                standing[standing] = self._hits(traced(x_left, y_left, seed, *lengths), y_left)
            left.append(standing)
        return left

    def right_in_noise(self, budget: Budget) -> list[np.ndarray]:
        """Tell which examples are classified rightly at a point drawn uniformly from the ball."""

        def nowhere(*tape_and_loss: Any) -> list[tf.Tensor]:
            return [tf.zeros_like(each) for each in tape_and_loss[-1]]

        found = []
        for index, (x, y) in enumerate(self._batches):
            noisy = attack(
                *(x, self._able, lambda moved, y=y: self._loss(moved, y), nowhere),
                seed=tf.constant([budget.seed, 2 * index + 2**20]),
                epsilon=budget.epsilon,
                norm=budget.norm,
                steps=1,
                step_size=budget.epsilon,
                clip_range=budget.clip_range,
            )
            found.append(self._hits(noisy, y))
        return found

    def zero_gradients(self) -> list[np.ndarray]:
        """Tell for which examples the loss has no gradient with respect to any input."""

        def zero(x: Any, y: tf.Tensor) -> tf.Tensor:
            tensors = [t for t, ok in zip(tf.nest.flatten(x), self._able, strict=True) if ok]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(tensors)
                loss = self._loss(x, y)
            gradients = [g for g in _gradients(self._model, tape, loss, tensors) if g is not None]
            flat = [tf.reshape(tf.cast(g, tf.float32), (tf.shape(g)[0], -1)) for g in gradients]
            return tf.reduce_all(tf.concat(flat, axis=1) == 0, axis=1) if flat else tf.ones(tf.shape(y)[:1], tf.bool)

        traced = tf.function(zero, reduce_retracing=True)
        return [traced(x, y).numpy() for x, y in self._batches]

    def whole_range(self, budget: Budget) -> float:
        """Return the radius of a ball around any example that all others lie in."""
        tensors = [t for x, _ in self._batches for t, ok in zip(tf.nest.flatten(x), self._able, strict=True) if ok]
        low, high = budget.clip_range or (
            min(float(tf.reduce_min(tensor)) for tensor in tensors),
            max(float(tf.reduce_max(tensor)) for tensor in tensors),
        )
        width = max(high - low, budget.epsilon)
        if budget.norm == "linf":
            return width
        return width * float(np.sqrt(max(tensor.shape[1:].num_elements() for tensor in tensors)))

    def _traced_log_probabilities(self, x: Any) -> tf.Tensor:
        def predicted() -> tf.Tensor:
            scores = _seam.forward(self._model, x, training=False)
            logits = None if self._classes.from_logits else _seam.logits_behind(scores)
            # Of a softmax that is nearly sure the logits still have a gradient, the probabilities, clipped, have none.
            if logits is None:
                return self._classes.log_probabilities(scores)
            return self._classes._replace(from_logits=True).log_probabilities(logits)

        return _seam.without_trace(self._model, predicted, training=False)

    def _loss(self, x: Any, y: tf.Tensor) -> tf.Tensor:
        one_hot = tf.one_hot(self._numbers(y), self._num_classes)
        return -tf.reduce_sum(one_hot * self._traced_log_probabilities(x))

    def _hits(self, x: Any, y: tf.Tensor) -> np.ndarray:
        return (tf.argmax(self._log_probabilities(x), axis=1) == self._numbers(y)).numpy()

    def _numbers(self, y: tf.Tensor) -> tf.Tensor:
        if len(y.shape) == 2 and y.shape[1] == self._num_classes:
            return tf.argmax(y, axis=1)
        return tf.cast(tf.reshape(y, [-1]), tf.int64)


def _gradients(model: Any, tape: tf.GradientTape, loss: tf.Tensor, tensors: list[tf.Tensor]) -> Any:
    if isinstance(model, Strategy) and getattr(model, "optimizer", None) is not None:
        return differentiate(model, tape, loss, tensors)  # Through its loss scale, where gradients are of 16 bits.
    return tape.gradient(loss, tensors)
