"""What the soak runs (tests/tools/soak.py): training and reinforcement learning, each in separate processes.

What would take most of a process's time and is not under test is shared: processes take the initial state and the
compiled step from the first. Everything else is the real thing: lock, data, restoring, the loop, saving, signals.
"""

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

STEPS, EVERY, CALL = 100, 4, 2  # in all, between checkpoints, in a call of reinforcement learning
SHARED = {"train.checkpoint_every": EVERY, "train.keep_every": 40, "logging.tensorboard": False}


@dataclass(frozen=True)
class Job:
    """A launcher with its settings, how its processes share what the first one made, and how to spoil a step.

    `prepared(state, frozen, meta)` has the launcher prepare its run with these arrays; `home` is the module of the
    run's class, in which it compiles its step.
    """

    module: str
    recipe: str
    settings: dict[str, Any]
    home: str
    run_class: str
    prepared: Callable[..., None]
    poison: Callable[[int], None]
    not_finite: str  # how the message about a spoilt step begins
    per_call: int = 1
    setup: Callable[[], None] = lambda: None  # in each process, before anything else

    def run(self, folder: Path, root: Path, inject: Callable[[], None]) -> None:
        """The whole life of a process, with the data in `root` and a fault."""
        from launch import cli

        self.setup()
        file = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / f"{self.module}.prepared"
        (self.recall if file.exists() else self.remember)(file)
        inject()
        settings = self.settings | {"data.root": root, "data.token_root": root / "tokens"}
        sys.argv = [self.module, f"--config={self.recipe}", f"--workdir={folder}"]
        sys.argv += [f"--config.{name}={value}" for name, value in settings.items()]
        cli.run(import_module(self.module).main)

    def remember(self, file: Path) -> None:
        """Keep what the first process prepares and compiles."""
        import jax
        import numpy as np
        from jax.experimental.serialize_executable import serialize

        home = import_module(self.home)
        run_class = getattr(home, self.run_class)
        compiled, compile_step, programs = home.compiled, run_class.compile_step, []

        def compile_and_note(*args):
            programs.append(compiled(*args))
            return programs[-1]

        def compile_and_keep(run, batch):
            arrays = jax.tree.map(np.asarray, (run.state, run.frozen))
            step = compile_step(run, batch)
            results = programs[-1].out_tree.unflatten([0] * programs[-1].out_tree.num_leaves)
            file.write_bytes(pickle.dumps((*arrays, run.meta, serialize(programs[-1])[0], results[1])))
            return step

        home.compiled, run_class.compile_step = compile_and_note, compile_and_keep

    def recall(self, file: Path) -> None:
        """Take the first process's initial state and compiled step: to trace them again takes most of the time."""
        import jax
        from jax.experimental.serialize_executable import deserialize_and_load

        *arrays, meta, program, metrics = pickle.loads(file.read_bytes())

        def load(jitted, *args):
            arguments, results = (args, {}), (args[0], metrics)
            return deserialize_and_load(program, jax.tree.structure(arguments), jax.tree.structure(results))

        import_module(self.home).compiled = load
        self.prepared(*arrays, meta)


def prepared_training(state, frozen, meta) -> None:
    """World-model training, without building the model."""
    from data.pipeline import TrainIterator, WindowBatches, WindowLoader
    from rlawm_jax.training import setup

    def prepare(config, workdir):
        mesh = setup.make_mesh(**config.mesh)
        batches = WindowBatches(WindowLoader(config.data, fingerprint=meta["fingerprint"]), "train")
        placed = (setup.place(tree, mesh) for tree in (state, frozen))
        return setup.Run(config, mesh, TrainIterator(batches, "train"), *placed, None, meta)

    setup.prepare = prepare


def poison_batch(step: int) -> None:
    """The actions of one step's batch are not numbers."""
    from data.pipeline import TrainIterator

    original = TrainIterator.__next__

    def poisoned(self):
        batch = original(self)
        if self.get_state()["batches"] == step:
            batch["actions"] = batch["actions"] * float("nan")
        return batch

    TrainIterator.__next__ = poisoned


def toy_world() -> None:
    """Reinforcement learning in the toy world, whose imagined returns before and after are not measured."""
    from rlawm_jax.rl import loop, setup
    from tests.rl.toy_run import toy_run

    setup.prepare, loop.imagined_returns = toy_run, lambda run, bank: lambda params: [0.0]


def prepared_toy(state, frozen, meta) -> None:
    """The toy world, without resetting its environments again."""
    from rlawm_jax.rl.ppo_learner import PPOLearner

    PPOLearner.init = lambda *_: state


def poison_bank(iteration: int) -> None:
    """The demonstrations are not numbers during the call that makes an iteration."""
    import jax.numpy as jnp

    from rlawm_jax.rl.setup import RLRun

    compile_step = RLRun.compile_step

    def compile_poisoned(run, batch):
        call = compile_step(run, batch)

        def poisoned(state, frozen, batch):
            if int(state.iteration) == (iteration - 1) // CALL * CALL:
                frozen = frozen._replace(bank=frozen.bank._replace(data=jnp.full_like(frozen.bank.data, jnp.nan)))
            return call(state, frozen, batch)

        return poisoned

    RLRun.compile_step = compile_poisoned


TRAINING = Job(
    module="launch.train",
    recipe="configs/pusht.py:debug",
    settings={
        **SHARED,
        "train.steps": STEPS,
        "objectives.image_decoder.enabled": False,
        "objectives.denoiser.start_step": 0,
        "optimizer.name": "adamw",  # a smaller program than Muon's
    },
    home="rlawm_jax.training.run",
    run_class="Run",
    prepared=prepared_training,
    poison=poison_batch,
    not_finite="step {}: loss or gradient of",
)
LEARNING = Job(
    module="launch.train_rl",
    recipe="configs/rl.py",
    settings={**SHARED, "train.iterations": STEPS, "train.iterations_per_call": CALL, "policy": "a clone"},
    home="rlawm_jax.rl.setup",
    run_class="RLRun",
    prepared=prepared_toy,
    poison=poison_bank,
    not_finite="iteration {}: the value of",
    per_call=CALL,
    setup=toy_world,
)


def digest(folder: Path, out: Path) -> None:
    """Save a hash of everything the last checkpoint restores to."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer

    checkpoints = Checkpointer(folder, read_only=True)
    sha = hashlib.sha256()
    sha.update(json.dumps(checkpoints.data(STEPS), sort_keys=True).encode())
    for item in (STATE, FROZEN):
        tree = ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(STEPS) / item)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            array = np.asarray(leaf)
            sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    out.write_text(sha.hexdigest())
