"""Prepares a learner from a config: policy, world model and demonstrations, all placed on the mesh."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.datasets import Datasets
from rlawm_jax.hosts import compiled, on_first_process
from rlawm_jax.models.policy import Policy, trainable, with_residual
from rlawm_jax.policy.checkpoint import load_policy, policy_meta
from rlawm_jax.policy.observation import check_decoder
from rlawm_jax.rl.demonstrations import Bank, Demonstrations, build_bank, plan
from rlawm_jax.rl.identity import NoBatches, identity_of
from rlawm_jax.rl.learner import (
    Frozen,
    Learner,
    frozen_shardings,
    jit_run,
    state_shardings,
)
from rlawm_jax.rl.learners import TITLES, learner_settings, make_learner
from rlawm_jax.rl.ppo import Metrics
from rlawm_jax.rng import stream
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.sharding import make_mesh, on_mesh, put, replicated
from rlawm_jax.training.restore import load_trained_backbone, load_world_model
from rlawm_jax.training.run import Batches, Words, describe
from rlawm_jax.weights.backbone import frame_encoder
from rlawm_jax.world_model import WorldModel

NEEDED = ("image_decoder", "rla", "denoiser")


@dataclass
class RLRun:
    """A prepared reinforcement learning run; each call performs config.train.iterations_per_call iterations.

    `policy_config` describes the policy with its heads; `held_out` is a bank of demonstrations used only for
    evaluation, never for learning.
    """

    config: ConfigDict
    policy_config: ConfigDict
    mesh: Mesh
    learner: Learner
    state: Any
    frozen: Frozen
    held_out: Bank
    recorded: tuple[Demonstrations, Demonstrations]  # for both banks, on the host
    identity: dict[str, Any] = field(default_factory=dict)  # by setting, what a resumed run must start from

    log_every = 1

    def __post_init__(self) -> None:
        """Derive the remaining fields from the configs."""
        self.iterator: Batches = NoBatches({"policy": self.config.policy} | self.identity)
        self.meta = policy_meta(self.policy_config)
        learner = self.config.learner
        self.words = Words(
            unit="iteration",
            title=f"{TITLES[learner]} in imagination",
            shown=("/reward", "/kl" if learner == "ppo" else "/grad_norm"),
            measured="the value of",
            remedy=f"lower config.{learner}.learning_rate",
            backbone="config.policy",
        )

    @property
    def steps(self) -> int:
        """config.train.iterations."""
        return self.config.train.iterations

    @property
    def steps_per_call(self) -> int:
        """config.train.iterations_per_call."""
        return self.config.train.iterations_per_call

    def saved_frozen(self) -> nnx.State:
        """The policy that acts."""
        return nnx.state(self.policy())

    def restored(self, state: Any, frozen: nnx.State) -> None:
        """Resume from a checkpoint's state, which holds all trained parts of the policy."""
        self.state = state

    def validate(self, step: int) -> dict[str, float]:
        """Nothing: held-out demonstrations are played before and after."""
        return {}

    def compile_step(self, batch: dict[str, jax.Array]) -> Callable[..., tuple[Any, Metrics]]:
        """The iterations of one call, compiled; prints parameters, memory and FLOPs before anything runs."""
        on_nonfinite = self.config.train.on_nonfinite
        jitted = jit_run(self.learner, self.state, self.frozen, self.mesh, self.steps_per_call, on_nonfinite)
        program = compiled(jitted, self.state, self.frozen)
        describe(program, self.state.params, self.frozen[:2])

        def call(state: Any, frozen: Frozen, batch: dict[str, jax.Array]) -> tuple[Any, Metrics]:
            state, metrics = program(state, frozen)
            return state, {f"rl/{name}": value for name, value in metrics.items()}

        return call

    def policy(self) -> Policy:
        """The policy in its current state."""
        return nnx.merge(self.learner.policy, self.state.params, self.frozen.policy)

    def model(self) -> WorldModel:
        """The world model that the policy learns in."""
        return nnx.merge(self.learner.model, self.frozen.model)


def prepare(config: ConfigDict) -> RLRun:
    """Load the policy and the world model, read the demonstrations onto the devices, reset the environments.

    Errors name the key or file at fault. The memory of the demonstration bank is printed before it is allocated.
    """
    mesh = make_mesh(**config.mesh)
    check_num_envs(config, mesh)
    policy, policy_config = load_base(config)
    model, world_config, meta = load_world(config, policy_config, mesh)
    chunk = policy.executed
    check_windows(config, world_config.data, chunk)
    graphdef, params, rest = nnx.split(policy, trainable, ...)
    model_def, weights = nnx.split(model)
    sees = {"observation_size": policy.image_size, "observation_resize": policy.resize}
    learner = make_learner(config, graphdef, model_def, chunk=chunk, **sees)
    if config.env.action_low and len(config.env.action_low) != policy.action_dim:
        raise ValueError(
            f"config.env.action_low, action_high: expected {policy.action_dim} bounds, one per action of "
            f"{config.policy}, found {len(config.env.action_low)}"
        )
    datasets = open_datasets(config, model, world_config, meta["fingerprint"])
    training, held_out = demonstrations(config, chunk, model, datasets)
    for name, part in (("training", training), ("held out", held_out)):
        announce(f"{name}: {plan(part, config.bank.store, mesh, config.bank.limit_gib)}")
    banks = [build_bank(part, config.bank.store, mesh) for part in (training, held_out)]
    frozen = Frozen(rest, weights, banks[0])
    frozen = put(frozen, frozen_shardings(frozen, mesh))
    params = put(params, jax.tree.map(lambda _: replicated(mesh), params))
    abstract = jax.eval_shape(learner.init, params, frozen)
    init = jax.jit(on_mesh(learner.init, mesh), out_shardings=state_shardings(abstract, mesh))
    state = compiled(init, params, frozen)(params, frozen)
    identity = identity_of(config, rest, meta, datasets)
    return RLRun(config, policy_config, mesh, learner, state, frozen, banks[1], (training, held_out), identity)


def check_num_envs(config: ConfigDict, mesh: Mesh) -> None:
    """Raise ValueError if environments or minibatches do not divide evenly over the devices."""
    parts, settings = mesh.shape["data"] * mesh.shape["fsdp"], learner_settings(config)
    for name in ("num_envs", "minibatch"):
        if name in settings and settings[name] % parts:
            raise ValueError(
                f"config.{config.learner}.{name}: expected a multiple of data x fsdp = {parts} devices, found "
                f"{settings[name]}"
            )


def load_base(config: ConfigDict) -> tuple[Policy, ConfigDict]:
    """The cloned policy with new heads and low-rank branches, acting exactly as before, and its config."""
    if not config.policy:
        raise ValueError(
            "config.policy: expected the run folder of a cloned policy (launch.train_policy), found none; "
            "give --config.policy=DIR"
        )
    policy, policy_config = load_policy(config.policy)
    if policy_config.observation != "decoded":
        raise ValueError(
            f"config.policy: expected a policy cloned on decoded frames, as imagination shows them, found "
            f"observation={policy_config.observation} in {config.policy}; clone with --config.observation=decoded"
        )
    if policy.residual is not None:
        raise ValueError(
            f"config.policy: expected a cloned policy, found one that has been through reinforcement learning in "
            f"{config.policy}; start from the policy it came from, or resume its own --workdir"
        )
    if policy.state_dim:
        raise ValueError(
            f"config.policy: expected a policy that reads frames only, found one that reads a state of "
            f"{policy.state_dim} numbers in {config.policy}: imagination has no state; train with policy.state_dim=0"
        )
    policy_config = policy_config.copy_and_resolve_references()
    with policy_config.unlocked():
        policy_config.policy.residual.update(config.residual)
    return with_residual(policy, policy_config, nnx.Rngs(stream(jax.random.key(config.seed), "policy_heads")))


def load_world(config: ConfigDict, policy_config: ConfigDict, mesh: Mesh) -> tuple[WorldModel, ConfigDict, Any]:
    """The world model to imagine with; rejects one that cannot imagine, or whose images the policy does not know."""
    folder = config.world_model or policy_config.world_model
    if not folder:
        raise ValueError(
            f"config.world_model: expected a world model's run folder, found none there nor in the policy "
            f"{config.policy}; give --config.world_model=DIR"
        )
    model, world_config, meta = load_world_model(folder, with_backbone=config.bank.store == "frames", mesh=mesh)
    if missing := [part for part in NEEDED if part not in meta["trained_parts"]]:
        raise ValueError(
            f"config.world_model: expected a trained {', '.join(missing)} in {folder}, "
            f"found {', '.join(meta['trained_parts'])} only"
        )
    check_decoder(policy_config, model)
    return model, world_config, meta


def check_windows(config: ConfigDict, data: ConfigDict, chunk: int) -> None:
    """Reject a world model that never saw `chunk` rows move the world by as many frames; `data` is its section."""
    folder = config.world_model or f"the world model of {config.policy}"
    for name, needed in (("stride", 1), ("last_action", False)):
        if data[name] != needed:
            raise ValueError(
                f"config.world_model: expected data.{name}={needed}, since k imagined rows lead k frames on, found "
                f"{data[name]} in {folder}; train one with --config.data.{name}={needed}"
            )
    # horizons count frames: a window of h has h - 1 rows
    least, most = data.min_horizon - 1, data.max_horizon - 1
    if not least <= chunk <= most:
        raise ValueError(
            f"config.policy: expected chunks of {least} to {most} actions, all that {folder} has seen "
            f"(data.min_horizon - 1 to data.max_horizon - 1), found {chunk} executed by {config.policy}"
        )


def open_datasets(config: ConfigDict, model: WorldModel, world_config: ConfigDict, fingerprint: str) -> Datasets:
    """The datasets of the demonstrations, with their tokens unless the bank holds frames; computes missing tokens."""
    if not config.bank.datasets:
        raise ValueError("config.bank.datasets: expected at least one 'name:split', found none")
    datasets = Datasets(config.data.root, config.bank.datasets, mask_top=world_config.data.mask_top)
    datasets.check_image_size(model.image_size, "config.world_model (its image size)")
    if config.bank.store != "frames":
        datasets.compute_tokens(
            config.data.token_root,
            fingerprint,
            lambda: frame_encoder(load_trained_backbone(world_config, fingerprint, "the world model")),
            backbone=world_config.backbone.name,
            alone=on_first_process,
        )
    return datasets


def demonstrations(
    config: ConfigDict, chunk: int, model: WorldModel, datasets: Datasets
) -> tuple[Demonstrations, Demonstrations]:
    """The training and the held-out demonstrations long enough for a chunk."""
    names = ", ".join(datasets.stores)
    parts = []
    for held_out in (False, True):
        episodes = [
            (reference, int(row))
            for reference, store in datasets.stores.items()
            for row in store.rows(config.data.val_episodes, held_out)
            if store.lengths[row] > chunk + 1
        ]
        if not held_out and config.bank.episodes:
            if config.bank.episodes > len(episodes):
                raise ValueError(
                    f"config.bank.episodes: expected at most {len(episodes)}, the training demonstrations of "
                    f"{names}, found {config.bank.episodes}"
                )
            episodes = episodes[: config.bank.episodes]
        if not episodes:
            which = "held-out" if held_out else "training"
            raise ValueError(
                f"config.bank.datasets: expected {which} demonstrations of more than {chunk + 1} frames, found none "
                f"in {names} with data.val_episodes={config.data.val_episodes}"
            )
        parts.append(_demonstrations_of(datasets, episodes, model))
    return parts[0], parts[1]


def _demonstrations_of(datasets: Datasets, episodes: Sequence[tuple[str, int]], model: WorldModel) -> Demonstrations:
    """Episodes by dataset and row, read as cached tokens where available, otherwise as frames."""
    stores = [datasets.stores[reference] for reference, _ in episodes]
    lengths = np.array([store.lengths[row] for store, (_, row) in zip(stores, episodes, strict=True)])
    ends = np.cumsum(lengths)
    read_episode = datasets.tokens if datasets.caches else datasets.frames
    shape: tuple[int, ...] = (model.image_size, model.image_size, 3)
    if datasets.caches:
        shape = next(iter(datasets.caches.values())).shape

    def read(frames: np.ndarray) -> np.ndarray:
        """Read frames numbered over all episodes, in any order; one read per consecutive run from the same episode."""
        owner = np.searchsorted(ends, frames, side="right")
        cuts = np.flatnonzero(np.diff(owner)) + 1
        parts = []
        for where, inside in zip(np.split(owner, cuts), np.split(frames, cuts), strict=True):
            reference, row = episodes[where[0]]
            first = ends[where[0]] - lengths[where[0]]
            parts.append(read_episode(reference, row, inside - first))
        return np.concatenate(parts)

    rows = [row for _, row in episodes]
    robots = np.array([store.robot_ids[row] for store, row in zip(stores, rows, strict=True)])
    actions = [store.actions(row) for store, row in zip(stores, rows, strict=True)]
    still = [store.hold_still(row, 0) for store, row in zip(stores, rows, strict=True)]
    return Demonstrations(lengths, robots, shape, read, actions, still)


def evaluation_starts(bank: Bank, episodes: int) -> tuple[jax.Array, jax.Array]:
    """First frames of up to `episodes` demonstrations, spread evenly over the bank."""
    count = min(episodes, len(bank.length))
    which = np.linspace(0, len(bank.length) - 1, count).round().astype(np.int32)
    return jnp.asarray(which), jnp.zeros(count, jnp.int32)
