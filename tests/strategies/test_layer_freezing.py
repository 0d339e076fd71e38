"""Layer freezing: weights stay during some updates, by name and schedule, in one trace."""

import keras
import numpy as np
import pytest
from nets import X, Y, sgd

import trainstep
from trainstep import errors


def net() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh", name="hid"), layers.Dense(1, name="out")])


def moves(frozen: dict, optimizer=None, updates: int = 4, **strategies) -> list[list[bool]]:
    """Return for each update which of (hidden kernel, hidden bias, output kernel, output bias) moved."""
    model = trainstep.apply(net(), {"layer_freezing": {"frozen": frozen}, **strategies})
    model.compile(optimizer or sgd(), "mse")
    found, before = [], model.get_weights()
    for _ in range(updates):
        model.train_on_batch(X[:4], Y[:4])
        after = model.get_weights()
        found.append([not np.array_equal(a, b) for a, b in zip(after, before, strict=True)])
        before = after
    return found


HIDDEN, ALL = [False, False, True, True], [True] * 4


def test_a_layer_stays_during_its_updates():
    assert moves({"hid": (1, 3)}) == [ALL, HIDDEN, HIDDEN, ALL]
    assert moves({"hid": (0, 2)}) == [HIDDEN, HIDDEN, ALL, ALL]


def test_or_for_good():
    assert moves({"hid": (2, None)}) == [ALL, ALL, HIDDEN, HIDDEN]


def test_patterns_are_of_weights():
    assert moves({"*/kernel": (0, None)}, updates=1) == [[False, True, False, True]]


@pytest.mark.parametrize("optimizer", [lambda: keras.optimizers.Adam(0.01), lambda: keras.optimizers.AdamW(0.01)])
def test_momentum_and_weight_decay_do_not_move_what_is_frozen(optimizer):
    assert moves({"hid": (1, 3)}, optimizer()) == [ALL, HIDDEN, HIDDEN, ALL]


def test_it_counts_updates_and_not_micro_batches():
    none = [False] * 4
    assert moves({"hid": (1, 2)}, gradient_accumulation={"steps": 2}) == [none, ALL, none, HIDDEN]


@pytest.mark.parametrize("span", [(3, 3), (3, 1), (-1, 2)])
def test_a_span_that_is_none_is_refused(span):
    with pytest.raises(errors.InvalidOptionsError, match="updates go from 0 on"):
        trainstep.plan("layer_freezing", frozen={"hid": span})


def test_a_name_that_is_none_is_refused():
    with pytest.raises(errors.ModelConflictError, match="no trainable weight is called 'hidd'"):
        moves({"hidd": (0, None)})
