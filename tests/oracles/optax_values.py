"""Writes what optax makes of a small net, for `tests/test_oracles.py`: optax itself is in none of the environments.

    python -m venv oracle && oracle/bin/pip install optax==0.2.8 jax==0.10.2
    oracle/bin/python tests/oracles/optax_values.py

Runs on optax and JAX alone, in float64; nothing of trainstep, Keras or TensorFlow is imported.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)

RATE = 0.1
UPDATES = 7


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Return normal numbers of three digits, so that they are the same in float32 and in a file."""
    return np.round(np.random.default_rng(seed).normal(size=shape), 3)


START = [numbers(0, 3, 2), numbers(1, 2), numbers(2, 2, 1), numbers(3, 1)]
X, Y = numbers(4, UPDATES, 4, 3), 2 * numbers(5, UPDATES, 4, 1)


def loss(weights, x, y):
    """Return the mean squared error of a net of one hidden layer, tanh."""
    kernel, bias, last_kernel, last_bias = weights
    return jnp.mean((jnp.tanh(x @ kernel + bias) @ last_kernel + last_bias - y) ** 2)


gradient_of = jax.grad(loss)


def trained(transformation, show=lambda weights: weights, **arguments):
    """Return the weights after each update."""
    weights = [jnp.asarray(w) for w in START]
    state, found = transformation.init(weights), []
    for x, y in zip(X, Y, strict=True):
        gradients = gradient_of(weights, x, y)
        given = {"grad_fn": lambda weights, _, x=x, y=y: gradient_of(weights, x, y)} if "sam" in arguments else {}
        updates, state = transformation.update(gradients, state, weights, **given)
        weights = optax.apply_updates(weights, updates)
        found.append(show(weights))
    return found


def outputs_first():
    """Return optax's centralization for kernels whose last axis is that of the outputs: optax's is the first."""

    def turned(gradients, source, destination):
        return [jnp.moveaxis(g, source, destination) if g.ndim > 1 else g for g in gradients]

    inner = optax.centralize()

    def update(gradients, state, weights=None):
        centralized, state = inner.update(turned(gradients, -1, 0), state, weights)
        return turned(centralized, 0, -1), state

    return optax.GradientTransformation(inner.init, update)


def before_sgd(*transformations):
    return trained(optax.chain(*transformations, optax.sgd(RATE)))


def lookahead(k, alpha):
    weights = optax.LookaheadParams.init_synced([jnp.asarray(w) for w in START])
    optimizer = optax.lookahead(optax.sgd(RATE), sync_period=k, slow_step_size=alpha)
    state, found = optimizer.init(weights), []
    for x, y in zip(X, Y, strict=True):
        updates, state = optimizer.update(gradient_of(weights.fast, x, y), state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(weights.fast)
    return found


def sam(rho):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return trained(optax.contrib.sam(optax.sgd(RATE), ascent, opaque_mode=True), sam=True)


def averages(decay):
    """Return the moving average of the weights after each update of SGD."""
    average, found = [jnp.asarray(w) for w in START], []
    for weights in trained(optax.sgd(RATE)):
        average = optax.incremental_update(weights, average, step_size=1 - decay)
        found.append(average)
    return found


def noise_ratios(gamma):
    """Return the noise of each update over that without annealing, from the same random numbers."""
    zeros = jnp.zeros(3)
    annealed, constant = (optax.add_noise(eta=1.0, gamma=g, key=0) for g in (gamma, 0.0))
    states, found = [annealed.init(zeros), constant.init(zeros)], []
    for _ in range(UPDATES):
        one, states[0] = annealed.update(zeros, states[0])
        other, states[1] = constant.update(zeros, states[1])
        found.append(float((one / other).mean()))
    return found


def kernel_clipped(*shape):
    """Return a kernel, a gradient, and that gradient clipped unit by unit."""
    weight, gradient = 0.1 * numbers(6, *shape), numbers(7, *shape)
    clip = optax.adaptive_grad_clip(0.2)
    clipped, _ = clip.update(jnp.asarray(gradient), clip.init(weight), jnp.asarray(weight))
    return {"weight": weight, "gradient": gradient, "clipped": clipped}


def listed(values):
    """Return arrays as nested lists, of eight digits."""
    if isinstance(values, dict):
        return {name: listed(each) for name, each in values.items()}
    if isinstance(values, list):
        return [listed(each) for each in values]
    return np.round(np.asarray(values, np.float64), 8).tolist()


def main() -> None:
    """Write the file."""
    values = {
        "made by": f"optax {optax.__version__}, JAX {jax.__version__}: python tests/oracles/optax_values.py",
        "start": START,
        "x": X,
        "y": Y,
        "sgd": trained(optax.sgd(RATE)),
        "adaptive_gradient_clipping": before_sgd(optax.adaptive_grad_clip(0.2, eps=0.5)),
        "gradient_centralization": before_sgd(outputs_first()),
        "gradient_clipping, global_clipnorm": before_sgd(optax.clip_by_global_norm(0.5)),
        "gradient_clipping, clipvalue": before_sgd(optax.clip(0.3)),
        "lookahead": lookahead(3, 0.4),
        "sam": sam(0.3),
        "ema": averages(0.8),
        "gradient_noise": noise_ratios(0.55),
        "a kernel of a convolution, clipped": kernel_clipped(2, 2, 2, 3),
    }
    made_by = values.pop("made by")
    text = json.dumps({"made by": made_by, **listed(values)}, separators=(",", ":")).replace('],"', '],\n"')
    pathlib.Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
