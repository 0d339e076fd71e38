"""Writes what TensorFlow Privacy makes of a small net, for `tests/test_oracles.py`: it is in none of the environments.

    python -m venv oracle && oracle/bin/pip install tensorflow-privacy==0.9.0 tensorflow==2.15.1
    oracle/bin/python tests/oracles/tensorflow_privacy_values.py

Runs on TensorFlow 2.15, its Keras and TensorFlow Privacy alone; nothing of trainstep is imported. The net, its weights
and the batches are those of `optax_values.json`.
"""

import json
import pathlib

import numpy as np
import tensorflow as tf
import tensorflow_privacy

HERE = pathlib.Path(__file__).parent
OPTAX = json.loads((HERE / "optax_values.json").read_text())
RATE, CLIP = 0.1, 0.5


def trained() -> list[list[np.ndarray]]:
    """Return the weights after each update: of each example the gradient is clipped, and no noise is added."""
    model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(2, "tanh"), tf.keras.layers.Dense(1)])
    model.set_weights([np.array(weight, "float32") for weight in OPTAX["start"]])
    batch = len(OPTAX["x"][0])
    optimizer = tensorflow_privacy.VectorizedDPKerasSGDOptimizer(
        l2_norm_clip=CLIP, noise_multiplier=0.0, num_microbatches=batch, learning_rate=RATE
    )
    model.compile(optimizer, tf.keras.losses.MeanSquaredError(reduction=tf.keras.losses.Reduction.NONE))
    found = []
    for x, y in zip(np.array(OPTAX["x"], "float32"), np.array(OPTAX["y"], "float32"), strict=True):
        model.train_on_batch(x, y)
        found.append(model.get_weights())
    return found


def main() -> None:
    """Write the file."""
    values = [[np.round(weight.astype("float64"), 8).tolist() for weight in weights] for weights in trained()]
    made_by = f"tensorflow-privacy {tensorflow_privacy.__version__}, TensorFlow {tf.__version__}"
    content = {"made by": f"{made_by}: python tests/oracles/{pathlib.Path(__file__).name}", "dp_sgd": values}
    text = json.dumps(content, separators=(",", ":")).replace(',"dp_sgd"', ',\n"dp_sgd"')
    pathlib.Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
