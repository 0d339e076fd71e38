"""Calibration: whether a model that is 80 % sure is right in 80 % of cases.

    ECE = sum over bins of  share of examples in it * | accuracy in it - mean confidence in it |

Confidence is the probability of the class the model chooses; the bins of (0, 1] are equally wide. The number depends
on how many there are, and is biased upwards where they hold few examples.

Naeini et al., AAAI 2015, https://ojs.aaai.org/index.php/AAAI/article/view/9602
Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599
"""

import numpy as np

from trainstep.errors import UnsupportedInputError


def expected_calibration_error(scores: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error, from 0 to 1.

    Args:
        scores: (examples, classes), two classes or more. Probabilities where every row lies within [0, 1] and sums to
            1, but for rounding to 16 bits; else logits, which the softmax turns into probabilities.
        y: class ids, (examples,) or (examples, 1); or one-hot, (examples, classes).
        bins: how many.

    Raises:
        UnsupportedInputError: `scores` or `y` are of another shape, empty or not finite.
    """
    scores, y = np.asarray(scores, dtype=np.float64), np.asarray(y)
    if scores.ndim != 2 or scores.shape[1] < 2 or not len(scores):
        raise UnsupportedInputError(
            "Calibration needs a model with one score for each class as its only output, of shape (examples, classes), "
            f"not {scores.shape}."
        )
    if not np.all(np.isfinite(scores)):
        raise UnsupportedInputError("Calibration needs finite scores, and some are infinite or not a number.")
    probabilities = scores if _are_probabilities(scores) else _softmax(scores)
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == _classes(y, scores.shape)
    # Bin i holds i / bins < confidence <= (i + 1) / bins. A probability that rounding made more than 1 is in the last.
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # Shares cancel: |hits - confidence| summed over a bin is its share times the gap of its means, times all examples.
    gaps = np.abs(np.bincount(bin_of, weights=hits - confidence, minlength=bins))
    return float(gaps.sum() / len(scores))


def _are_probabilities(scores: np.ndarray) -> bool:
    rounding = 2.0**-7  # Of bfloat16, which keeps 8 bits.
    return bool(
        np.all(scores >= 0) and np.all(scores <= 1 + rounding) and np.all(np.abs(scores.sum(axis=1) - 1) <= rounding)
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _classes(y: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if y.shape == shape:
        return y.argmax(axis=1)
    if y.shape in ((shape[0],), (shape[0], 1)):
        return y.reshape(-1).astype(np.int64)
    raise UnsupportedInputError(
        f"Calibration needs class ids of shape ({shape[0]},), or one-hot labels of shape {shape}, not {y.shape}."
    )
