"""The expected calibration error, against values worked out by hand."""

import numpy as np
import pytest

from trainstep.benchmarks.calibration import expected_calibration_error
from trainstep.errors import UnsupportedInputError

# Confidence 0.9, right and wrong; 0.6, right. With two bins all are in the upper one: accuracy 2/3, mean confidence
# 0.8, error 2/15. With ten bins: (0.8, 0.9] holds two, |1/2 - 0.9| = 0.4; (0.5, 0.6] one, |1 - 0.6| = 0.4; so 0.4.
SCORES = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
Y = np.array([0, 0, 0])


def test_values_by_hand():
    assert expected_calibration_error(SCORES, Y, bins=2) == pytest.approx(2 / 15)
    assert expected_calibration_error(SCORES, Y, bins=10) == pytest.approx(0.4)


def test_logits_are_told_from_probabilities():
    logits = np.log(SCORES) + np.array([[3.0], [-1.0], [0.0]])  # The softmax does not see what is added to a row.
    assert expected_calibration_error(logits, Y) == pytest.approx(expected_calibration_error(SCORES, Y))


def test_labels_may_be_ids_a_column_or_one_hot():
    expected = expected_calibration_error(SCORES, Y)
    assert expected_calibration_error(SCORES, Y[:, np.newaxis]) == expected
    assert expected_calibration_error(SCORES, np.eye(2)[Y]) == expected


def test_a_sure_model_that_is_right_has_none_and_one_that_is_wrong_has_all():
    sure = np.eye(3)[[0, 1, 2]]
    assert expected_calibration_error(sure, np.array([0, 1, 2])) == 0
    assert expected_calibration_error(sure, np.array([1, 2, 0])) == 1


def test_probabilities_rounded_to_16_bits_are_still_probabilities():
    rounded = np.float16(SCORES)
    assert expected_calibration_error(rounded, Y, bins=2) == pytest.approx(2 / 15, abs=1e-3)


@pytest.mark.parametrize(
    ("scores", "y"),
    [
        (np.zeros((3, 1)), Y),
        (np.zeros(3), Y),
        (np.zeros((0, 2)), Y[:0]),
        (np.full((3, 2), np.nan), Y),
        (SCORES, Y[:2]),
        (SCORES, np.zeros((3, 3))),
    ],
)
def test_what_has_no_calibration_is_refused(scores, y):
    with pytest.raises(UnsupportedInputError, match="Calibration needs"):
        expected_calibration_error(scores, y)
