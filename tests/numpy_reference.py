"""The layers' formulas in plain numpy and float64, reading the parameters of our modules by name."""

import math

import numpy as np
from flax import nnx


def leaf(module: nnx.Module, name: str) -> np.ndarray:
    """A parameter by dotted path, in float64."""
    value = module
    for step in name.split("."):
        value = getattr(value, step)
    return np.asarray(value[...], np.float64)


def affine(module: nnx.Module, name: str, x: np.ndarray) -> np.ndarray:
    return x @ leaf(module, f"{name}.kernel") + leaf(module, f"{name}.bias")


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def standardised(x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """LayerNorm without parameters."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def attention(module: nnx.Module, x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """One batch element [l, c] over [s, e], head by head."""
    query, key, value = (affine(module, n, y) for n, y in (("query", x), ("key", source), ("value", source)))
    size = query.shape[-1] // module.heads
    heads = []
    for h in range(module.heads):
        own = slice(h * size, (h + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, own])
    return affine(module, "out", np.concatenate(heads, axis=-1))


def mlp(module: nnx.Module, x: np.ndarray) -> np.ndarray:
    return affine(module, "down", gelu(affine(module, "up", x)))


def gru(module: nnx.Module, x: np.ndarray, length: int) -> np.ndarray:
    """The hidden state of one sequence [t, i] after `length` rows: torch's equations, row by row."""
    names = ("input_kernel", "input_bias", "hidden_kernel", "hidden_bias")
    input_kernel, input_bias, hidden_kernel, hidden_bias = (leaf(module, name) for name in names)
    h = np.zeros(module.hidden)
    for row in x[:length]:
        xr, xz, xn = np.split(row @ input_kernel + input_bias, 3)
        hr, hz, hn = np.split(h @ hidden_kernel + hidden_bias, 3)
        reset, update = 1 / (1 + np.exp(-(xr + hr))), 1 / (1 + np.exp(-(xz + hz)))
        h = (1 - update) * np.tanh(xn + reset * hn) + update * h
    return h


def modulation(module: nnx.Module, vec: np.ndarray) -> list[np.ndarray]:
    """Shift, scale, gate of attention, then of the MLP, of one sample."""
    return np.split(affine(module, "linear", silu(vec)), 6)
