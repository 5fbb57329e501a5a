"""Drive the robot inside a world model, in a browser on this machine: python -m launch.imagine --workdir=RUN

Opens on a frame of a held-out episode. Where the dataset's simulator is installed, it moves beside the model. Ctrl-C
ends it.
"""

import contextlib
import functools
from typing import Any

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of the world model.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to drive in; the newest by default.", lower_bound=0)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the built datasets, if not the run's data.root.")
PORT = flags.DEFINE_integer("port", 8000, "Port on 127.0.0.1; 0 is any free one.", lower_bound=0, upper_bound=65535)
flags.mark_flag_as_required("workdir")


def main() -> None:
    """Load the model, serve the page, stop at Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        from rlawm_jax.interactive.server import Server
        from rlawm_jax.reports.html import page

        server = Server(PORT.value)  # first: whoever named a taken port need not wait for the model
        session, info = load_session()
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        server.run(session, page("imagine.html", run=WORKDIR.value, step=info["step"]))


def load_session() -> tuple[Any, dict[str, Any]]:
    """The session that the flags describe, and the checkpoint's facts."""
    from data.pipeline import WindowLoader
    from rlawm_jax.evaluation.chunking import longest_chunk
    from rlawm_jax.flow import Sampler
    from rlawm_jax.interactive.rollout import Rollout
    from rlawm_jax.interactive.session import Session
    from rlawm_jax.interactive.starts import Starts
    from rlawm_jax.training.restore import load_world_model

    model, config, info = load_world_model(cli.run_folder(WORKDIR.value), step=STEP.value, with_backbone=True)
    if missing := [p for p in ("image_decoder", "rla", "denoiser") if p not in info["trained_parts"]]:
        raise ValueError(f"--workdir: expected a trained {', '.join(missing)} in {WORKDIR.value}, found none")
    config.data.source = "frames"  # starts are encoded one by one, so no token cache is needed
    config.data.root = DATA_DIR.value or config.data.root
    loader = WindowLoader(config.data)
    rollout = Rollout(
        model,
        Sampler(**config.sampler),
        rows=longest_chunk(config),
        width=loader.action_dim,
        last_action=config.data.last_action,
        seed=config.eval.seed,
    )
    return Session(
        rollout, Starts(loader, seed=config.eval.seed), functools.cache(simulator_of), stride=config.data.stride
    ), info


def simulator_of(store: Any) -> Any:
    """The simulator that the dataset was recorded in; None, saying why, where it cannot run here."""
    from rlawm_jax import sim
    from rlawm_jax.run_folder.logging import announce

    name = sim.for_dataset(store.reference)
    if name is None:
        announce(f"{store.reference}: no simulator of ours; the model runs alone")
        return None
    try:
        simulator = sim.make(name, store.image_size[0])
    except ValueError as error:
        announce(f"{error}; the model runs alone")
        return None
    if simulator.task.action_dim != store.action_dim:
        announce(
            f"{store.reference}: expected actions of {simulator.task.action_dim} numbers as {name} has, found "
            f"{store.action_dim}; the model runs alone"
        )
        return None
    return simulator


if __name__ == "__main__":
    cli.run(main)
