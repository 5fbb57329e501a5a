"""Run by tests with eight forced devices; JSON to argv[1].

Alone: the learners of test_ppo_learner.py and test_pathwise.py on one of them and on all. With argv[2] and argv[3], the
tiny dataset's root and a cloned policy: a whole run of the tiny recipe with data, fsdp and tensor axes.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rlawm_jax import sharding
from rlawm_jax.rl.learner import frozen_shardings, jit_run, state_shardings
from rlawm_jax.rl.loop import train
from rlawm_jax.rl.setup import prepare
from rlawm_jax.sharding import make_mesh
from tests.rl import test_pathwise, test_ppo_learner, tiny
from tests.tiny_run import read_metrics

ITERATIONS = 3
MAKERS = {"ppo": test_ppo_learner.make, "pathwise": test_pathwise.make}


def pieces(array: jax.Array) -> int:
    """Into how many parts an array is split."""
    return array.size // array.addressable_shards[0].data.size


def on(count: int, make: Callable) -> dict:
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
        **{name: np.asarray(metrics[name]).tolist() for name in metrics if "/" not in name},
    }


def whole_run(root: Path, cloned: Path) -> dict:
    """Metrics of a run on 2 x 2 x 2 devices, and into how many parts kernels of the world model are split."""
    sharding.MIN_SPLIT_SIZE = 64  # tiny kernels too
    with tempfile.TemporaryDirectory() as workdir:
        run = prepare(tiny.make(root, cloned, mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
        split = sorted({pieces(leaf) for leaf in jax.tree.leaves(run.frozen.model)})
        train(run, Path(workdir))
        return {"metrics": read_metrics(Path(workdir)), "pieces": split}


if __name__ == "__main__":
    out, *given = map(Path, sys.argv[1:])
    out.write_text(
        json.dumps(
            whole_run(*given)
            if given
            else {name: {"one": on(1, make), "eight": on(8, make)} for name, make in MAKERS.items()}
        )
    )
