"""Our attack beside foolbox's: on a net of two weights, whose robust accuracy is known, and on the real one."""

import json

import keras
import needs
import numpy as np
import pytest
import tensorflow as tf

import trainstep
from trainstep.benchmarks import foreign_attack
from trainstep.benchmarks.attack import Attack, compiled_attack, robust_accuracy

pytest.importorskip("foolbox", reason="in the environment of tensorflow-addons")


def linear() -> keras.Model:
    """Return a net whose classes meet at x = 0.5: the logit of class 1 is 8 x - 4, that of class 0 is 0."""
    model = trainstep.apply(keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(2, "softmax")]), "standard")
    model.set_weights([np.array([[0.0, 8.0]], "float32"), np.array([0.0, -4.0], "float32")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


# The third and the fifth are within 0.1 of the border, the last is wrong as it is: 3 of 6 withstand.
X = np.array([[0.0], [0.3], [0.45], [1.0], [0.55], [0.9]], "float32")
Y = np.array([0, 0, 0, 1, 1, 0])


def test_both_attacks_find_what_can_be_found_and_no_more():
    model, attack = linear(), Attack(epsilon=0.1, steps=10, clip_range=(0.0, 1.0))
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    assert robust_accuracy(compiled_attack(model, attack), batches, attack) == 0.5
    assert foreign_attack.foolbox_robust_accuracy(model, X, Y, attack) == 0.5


def test_logits_are_what_the_softmax_is_taken_of():
    model = linear()
    np.testing.assert_allclose(foreign_attack.logits_of(model)(tf.constant(X)), X * [[0.0, 8.0]] - [[0.0, 4.0]])


def test_the_batches_of_the_attack_change_nothing_but_the_random_start(monkeypatch):
    monkeypatch.setattr(foreign_attack, "_BATCH", 4)
    attack = Attack(epsilon=0.1, steps=10, clip_range=(0.0, 1.0))
    assert foreign_attack.foolbox_robust_accuracy(linear(), X, Y, attack) == 0.5


@needs.fashion_mnist
def test_models_are_trained_attacked_and_kept_by_seed(tmp_path, capsys):
    arguments = ["--seeds", "1", "--train-examples", "256", "--examples", "4", "--output", str(tmp_path)]
    assert foreign_attack.main(arguments) == 0
    [path] = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert [(row["strategy"], row["seed"]) for row in content["rows"]] == [("adversarial pgd", 0), ("standard", 0)]
    for row in content["rows"]:
        assert 0 <= max(row["robust_accuracy"], row["foolbox_robust_accuracy"]) <= row["accuracy"] <= 1
    assert content["environment"]["foolbox"]
    assert content["settings"]["attack"]["steps"] == 40
    capsys.readouterr()
    with pytest.raises(SystemExit):
        foreign_attack.main(arguments)
    assert "Results are never edited" in capsys.readouterr().err
