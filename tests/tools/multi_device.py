"""Run by tests/test_sharding.py with eight forced devices; writes what came out to argv[2].

argv[1] is "steps" (a few steps on each of four meshes), "programs" (a step of recognisable sizes, compiled only) or the
root of the tiny dataset (the whole recipe on one mesh).
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

from rlawm_jax import sharding
from rlawm_jax.compile_check import abstract_programs, cost
from rlawm_jax.training.loop import train
from rlawm_jax.training.setup import prepare
from rlawm_jax.training.state import init_state, split_model
from rlawm_jax.training.step import jit_train_step, make_objectives, make_train_step
from tests.tiny_models import tiny_config as tiny_config_of_models
from tests.tiny_models import tiny_world
from tests.tiny_run import read_metrics, tiny_config
from tests.training.test_step import only

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
STEPS, BATCH = 3, 8
# the image decoder would be most of the compilation
RECIPE = {"objectives.image_decoder.enabled": False}
# 5x5 patches of 384 channels, alone and behind 3 learned tokens; widths and depths that no batch has
TOKEN_SIZES = (25, 28, 50)
PROGRAM = {
    "objectives__image_decoder__enabled": False,
    "backbone__image_size": 70,
    "data__source": "tokens",
    "data__batch_size": 16,
    "rla__width": 48,
    "rla__depth": 6,
    "denoiser__width": 48,
    "denoiser__cond_depth": 6,
    "denoiser__flow_depth": 6,
}
# the image decoder alone, on every other window: frames of 5, 10, 20, 40 and 80 pixels on the way to 70
FRAME_SIZES = (5, 10, 20, 25, 40, 70, 80)
FRAMES = {
    "objectives__image_decoder__enabled": True,
    "objectives__image_decoder__max_images": 16,
    "objectives__rla__enabled": False,
    "objectives__denoiser__enabled": False,
    "image_decoder__width": 48,
}


def batch(step: int) -> dict[str, np.ndarray]:
    """Eight windows of tokens, the same on every mesh."""
    rng = np.random.default_rng(step)
    return {
        "tokens": rng.normal(size=(BATCH, 2, 4, 384)).astype(np.float32),
        "actions": rng.normal(size=(BATCH, 5, 3)).astype(np.float32),
        "num_actions": rng.integers(1, 6, BATCH).astype(np.int32),
        "robot_id": np.array([0, 2] * (BATCH // 2), np.int32),
    }


def steps_on(shape: tuple[int, int, int]) -> dict:
    """Losses, parameters by path, and how many pieces each is in, after three steps of gradient descent."""
    mesh = sharding.make_mesh(*shape, jax.devices()[: int(np.prod(shape))])
    config = only(("rla", "denoiser"))
    objectives = make_objectives(config)
    transforms = dict.fromkeys(objectives, optax.sgd(0.1, momentum=0.9))
    graphdef, params, frozen = split_model(tiny_world(), list(objectives))
    state = init_state(params, transforms, np.float32(1.0))
    state = jax.device_put(state, sharding.tree_shardings(state, mesh))
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    step = make_train_step(graphdef, objectives, transforms, seed=0, running_latent_scale=True)
    step = jit_train_step(step, state, frozen, mesh, list(batch(0)))
    metrics = []
    for i in range(STEPS):
        state, measured = step(state, frozen, sharding.shard_batch(batch(i), mesh))
        metrics.append({name: float(value) for name, value in measured.items()})
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    named = {sharding.path_name(path).removesuffix("/value"): leaf for path, leaf in leaves}
    return {
        "metrics": metrics,
        "params": {name: np.asarray(leaf).ravel().tolist() for name, leaf in named.items()},
        "pieces": {name: leaf.size // leaf.addressable_shards[0].data.size for name, leaf in named.items()},
    }


def program_on(shape: tuple[int, int, int], **overrides) -> dict:
    """Collectives of the compiled step, and bytes of its state on each device.

    Token batches have `TOKEN_SIZES` among their dimensions and parameters have not, so that a gathered batch shows.
    """
    mesh = sharding.make_mesh(*shape, jax.devices()[: int(np.prod(shape))])
    config = tiny_config_of_models(**PROGRAM | overrides)
    program = abstract_programs.train_program(config, mesh)
    compiled = program.function.lower(*program.arguments).compile()
    collectives = [
        {"kind": kind, "shape": shape, "bytes": size, "times": times}
        for kind, results, times in cost.operations(compiled.as_text())
        for shape, size in results
    ]
    sizes = {name: cost.bytes_per_device(program.kinds[name]) for name in ("parameters", "optimizer")}
    return {"collectives": collectives, **sizes, "arguments": cost.memory(compiled).arguments}


def recipe_on(mesh: dict[str, int], root: Path, workdir: Path, **overrides) -> list[dict]:
    """Metrics of a whole run of the debug recipe on a mesh over all devices."""
    config = tiny_config(root, **RECIPE | {f"mesh.{axis}": size for axis, size in mesh.items()} | overrides)
    train(prepare(config, workdir), workdir)
    return read_metrics(workdir)


def recipe(root: Path) -> dict[str, list[dict]]:
    """The recipe on fsdp x tensor, and a second stage that takes its RLA, whose checkpoint is read on one device."""
    mesh = {"fsdp": 2, "tensor": 2}
    with tempfile.TemporaryDirectory() as workdir:
        first, second = Path(workdir, "first"), Path(workdir, "second")
        stage = {"train.init_from": str(first), "objectives.rla.enabled": False, "train.steps": 3}
        return {"first": recipe_on(mesh, root, first), "second": recipe_on(mesh, root, second, **stage)}


def main() -> None:
    """Small leaves are split too, so that the tiny networks are really in pieces."""
    sharding.MIN_SPLIT_SIZE = 64
    what, out = sys.argv[1], Path(sys.argv[2])
    if what == "programs":
        results = {name: program_on(shape) for name, shape in MESHES.items()}
        results["accumulated"] = program_on((2, 4, 1), train__accumulate=2)
        results["frames"] = program_on((2, 4, 1), **FRAMES)
    else:
        results = {name: steps_on(shape) for name, shape in MESHES.items()} if what == "steps" else recipe(Path(what))
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
