"""Run by tests/rl/test_learner.py with eight forced devices: the learner on one of them and on all; JSON to argv[1]."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from rlawm_jax.rl.learner import frozen_shardings, jit_run, state_shardings
from rlawm_jax.sharding import make_mesh
from tests.rl.test_learner import make

ITERATIONS = 3


def pieces(array: jax.Array) -> int:
    """Into how many parts an array is split."""
    return array.size // array.addressable_shards[0].data.size


def on(count: int) -> dict:
    """Metrics, parameters and the number of pieces after a few iterations on `count` devices."""
    mesh = make_mesh(count, 1, 1, jax.devices()[:count])
    learner, state, frozen = make(mesh=mesh)
    state = jax.device_put(state, state_shardings(state, mesh))
    frozen = jax.device_put(frozen, frozen_shardings(frozen, mesh))
    state, metrics = jit_run(learner, state, frozen, mesh, ITERATIONS)(state, frozen)
    split = {"tokens": state.env.tokens, "observation": state.observation, "bank": frozen.bank.data}
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.params)]
    return {
        "params": np.concatenate(leaves).tolist(),
        "pieces": {name: pieces(array) for name, array in split.items()},
        **{name: np.asarray(metrics[name]).tolist() for name in ("reward", "kl", "loss")},
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({"one": on(1), "eight": on(8)}))
