"""Runs for the loop: the protocol, and the class for world-model training and for cloning."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlawm_jax.hosts import compiled
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.training.nonfinite import guarded
from rlawm_jax.training.state import count_parameters
from rlawm_jax.training.step import TrainStep, jit_train_step
from rlawm_jax.world_model import EXTERNAL


class Words(NamedTuple):
    """The words the loop uses in messages about a run."""

    unit: str  # counted by the loop
    title: str  # of the progress bar
    shown: tuple[str, ...]  # endings of the metrics shown beside the bar
    measured: str  # precedes the names of what is not finite
    remedy: str  # what to do about it
    backbone: str  # the setting that determines the backbone


class Batches(Protocol):
    """An endless iterator of batches whose position can be stored in a checkpoint."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any], /) -> None: ...


class Trainable(Protocol):
    """The interface `training.loop` needs; one call of the compiled step makes `steps_per_call` steps.

    From its config the loop reads `logging` and, under `train`, checkpoint_every, keep_checkpoints, keep_every and
    on_nonfinite. The first field of its state counts finished steps.
    """

    config: ConfigDict
    mesh: Mesh
    iterator: Batches
    state: Any  # a NamedTuple, donated to each call
    frozen: Any  # read by each call
    meta: dict[str, Any]  # stored with each checkpoint, including the backbone's "fingerprint"
    words: Words

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        ...

    @property
    def steps_per_call(self) -> int:
        """The number of steps one call makes."""
        ...

    @property
    def log_every(self) -> int:
        """The number of steps between log lines."""
        ...

    def saved_frozen(self) -> nnx.State:
        """The untrained arrays to save, for readers that do not load the training state."""
        ...

    def restored(self, state: Any, frozen: nnx.State) -> None:
        """Take a checkpoint's arrays: the state, and those from `saved_frozen`."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Values to log after a step, from data that is not trained on; none where there is nothing to say."""
        ...

    def compile_step(self, batch: dict[str, jax.Array]) -> Callable[[Any, Any, dict[str, jax.Array]], Any]:
        """(state, frozen, batch) -> (state, metrics), compiled and `guarded`; metrics are scalars or [steps_per_call].

        Metrics whose names end in "/finite" say which of the others can be trusted; they are not logged.
        """
        ...


@dataclasses.dataclass
class Run:
    """A prepared training run: `step_fn(state, frozen, batch)` is ready to be jitted over `mesh`."""

    config: ConfigDict
    mesh: Mesh
    iterator: Batches
    state: Any
    frozen: nnx.State
    step_fn: TrainStep
    meta: dict[str, Any]
    # (step, state, frozen) -> values to log
    validation: Callable[[int, Any, nnx.State], dict[str, float]] | None = dataclasses.field(default=None, kw_only=True)

    words = Words(
        unit="step",
        title="train",
        shown=("/loss",),
        measured="loss or gradient of",
        remedy="lower config.optimizer.learning_rate or set config.optimizer.clip",
        backbone="config.backbone",
    )
    steps_per_call = 1

    @property
    def steps(self) -> int:
        """config.train.steps."""
        return self.config.train.steps

    @property
    def log_every(self) -> int:
        """config.train.log_every."""
        return self.config.train.log_every

    def saved_frozen(self) -> nnx.State:
        """The untrained arrays a checkpoint holds."""
        return without_external(self.frozen)

    def restored(self, state: Any, frozen: nnx.State) -> None:
        """Take a checkpoint's arrays; those loaded from separate weights files stay."""
        self.state = state
        for name, value in frozen.items():
            self.frozen[name] = value

    def validate(self, step: int) -> dict[str, float]:
        """What `validation` finds; it reads the state and changes nothing."""
        return {} if self.validation is None else self.validation(step, self.state, self.frozen)

    def compile_step(self, batch: dict[str, jax.Array]) -> jax.stages.Compiled:
        """The step compiled for this batch; prints parameters, memory and FLOPs before anything runs."""
        step = guarded(self.step_fn, self.config.train.on_nonfinite)
        jitted = jit_train_step(step, self.state, self.frozen, self.mesh, list(batch))
        program = compiled(jitted, self.state, self.frozen, batch)
        describe(program, self.state.params, self.frozen)
        return program


def without_external(state: nnx.State) -> nnx.State:
    """A model's state without the arrays that come from separate weights files."""
    return nnx.State({name: value for name, value in state.items() if name not in EXTERNAL})


def describe(program: jax.stages.Compiled, params: Any, frozen: Any) -> None:
    """Print a compiled step's parameters by part, its memory and its FLOPs."""
    table = ", ".join(f"{part} {count_parameters(p) / 1e6:.2f}M" for part, p in params.items())
    announce(f"trained parameters: {table}; frozen: {count_parameters(frozen) / 1e6:.2f}M")
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        used -= memory.alias_size_in_bytes
        announce(f"compiled step: {used / 2**20:.0f} MiB per device, {cost.get('flops', float('nan')) / 1e9:.1f} GFLOP")
