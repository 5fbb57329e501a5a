"""The frames a policy trains on, from datasets: decoded once, at the policy's size, before training starts.

Decoding costs a backbone and a decoder pass per frame; the results are small. Doing it once instead of in every step
makes a step hundreds of times cheaper; it needs image_size^2 x 3 bytes per frame, printed before they are allocated.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from data.cloning import EpisodeArrays, Roles, frame_offsets
from data.datasets import Datasets
from data.episodes import EpisodeStore
from rlawm_jax.hosts import on_first_process
from rlawm_jax.models.policy import resized
from rlawm_jax.policy.observation import ObservationModel, decoded
from rlawm_jax.run_folder.logging import announce, progress
from rlawm_jax.weights.backbone import fingerprint, frame_encoder

BATCH = 16  # frames per call: an episode's last call is padded, so larger calls would waste more
MEMORY_SHARE = 0.8  # fraction of the machine's memory


def open_datasets(config: ConfigDict, observer: ObservationModel | None) -> Datasets:
    """The datasets of a policy recipe, with their tokens where the world model was trained on cached ones.

    Rejects frames of mixed sizes or of a size other than the world model's, and actions the policy cannot output.
    """
    if not config.data.demonstrations:
        raise ValueError("config.data.demonstrations: expected at least one 'name:split', found none")
    video = config.data.video if config.policy.rla.enabled else ()
    # a policy that uses frames unchanged has no world model, and so no mask setting
    mask_top = observer.config.data.mask_top if observer else 0.0
    datasets = Datasets(config.data.root, [*config.data.demonstrations, *video], mask_top=mask_top)
    sizes = {reference: store.image_size for reference, store in datasets.stores.items()}
    if len(set(sizes.values())) > 1 or any(height != width for height, width in sizes.values()):
        raise ValueError(f"config.data.demonstrations, video: expected square frames of one size, found {sizes}")
    for reference in config.data.demonstrations:
        if datasets.stores[reference].action_dim != config.policy.action_dim:
            raise ValueError(
                f"config.policy.action_dim: expected {datasets.stores[reference].action_dim} as in {reference}, "
                f"found {config.policy.action_dim}"
            )
    if observer:
        datasets.check_image_size(observer.model.image_size, "config.world_model (its image size)")
    return datasets


class FrameReader:
    """Reads episodes as frames of the policy's size, and as the latent actions of its chunks."""

    def __init__(self, config: ConfigDict, datasets: Datasets, observer: ObservationModel | None) -> None:
        """`observer` is the policy's observation model, or None where frames are used unchanged."""
        self.datasets, self.horizon, self.every = datasets, config.policy.horizon, config.data.every
        self.decoded, self.with_latents = config.observation == "decoded", config.policy.rla.enabled
        size, resize = config.policy.image_size, config.policy.resize
        self._resize = jax.jit(lambda frames: _to_bytes(resized(frames / 255.0, size, resize)))
        if observer is None:
            return
        graphdef, self._weights = nnx.split(observer.model)

        def program(function: Callable) -> Callable:
            return jax.jit(lambda weights, *args: function(nnx.merge(graphdef, weights), *args))

        # tokens are passed as bfloat16, as in a token cache
        self._encode = program(lambda model, frames: model.encode(frames).astype(jnp.bfloat16))
        self._decode = program(lambda model, s: _to_bytes(decoded(model, s.astype(jnp.float32), size, resize)))
        self._latent = program(
            lambda model, s0, s1: model.latent(s0.astype(jnp.float32), s1.astype(jnp.float32)).reshape(len(s0), -1)
        )
        world = observer.config
        if world.data.source == "tokens":
            backbone = observer.model.backbone
            assert backbone is not None
            datasets.compute_tokens(
                config.data.token_root,
                observer.fingerprint,
                partial(frame_encoder, backbone),
                backbone=world.backbone.name,
                alone=on_first_process,
            )

    def episode(self, reference: str, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Frames uint8 [p, s, s, 3], every n-th one, and the latents [p, z] of the chunks that start there."""
        length = int(self.datasets.stores[reference].lengths[row])
        first = np.arange(0, length, self.every)
        last = np.minimum(first + self.horizon, length - 1)
        latents = first_tokens = None
        if self.with_latents:
            # some frames are the first of one chunk and the last of another
            frames, place = np.unique(np.concatenate([first, last]), return_inverse=True)
            tokens = self._tokens(reference, row, frames)
            first_tokens, last_tokens = tokens[place[: len(first)]], tokens[place[len(first) :]]
            latents = _in_batches(lambda s0, s1: self._latent(self._weights, s0, s1), first_tokens, last_tokens)
        if not self.decoded:
            return _in_batches(self._resize, self.datasets.frames(reference, row, first.tolist())), latents
        if first_tokens is None:
            first_tokens = self._tokens(reference, row, first)
        return _in_batches(lambda tokens: self._decode(self._weights, tokens), first_tokens), latents

    def _tokens(self, reference: str, row: int, which: np.ndarray) -> np.ndarray:
        if self.datasets.caches:
            return self.datasets.tokens(reference, row, which)
        frames = self.datasets.frames(reference, row, which.tolist())
        return _in_batches(lambda images: self._encode(self._weights, images), frames)


def read_episodes(config: ConfigDict, roles: Roles, reader: FrameReader) -> EpisodeArrays:
    """Every frame of the roles' episodes as the policy will see it; prints the memory needed and rejects too much."""
    stores, labelled = reader.datasets.stores, len(roles.labelled)
    lengths = [int(stores[name].lengths[row]) for name, row in roles.all]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    frames = frame_offsets(offsets, config.data.every)
    size, total, width = config.policy.image_size, int(frames[-1]), config.policy.rla.latent_dim
    needed = total * (size * size * 3 + (4 * width if reader.with_latents else 0))
    announce(
        f"policy data: {labelled} labelled, {len(roles.video)} watched, {len(roles.validation)} held-out episodes; "
        f"{total} frames x {size}x{size}x3 bytes = {needed / 2**20:.0f} MiB in memory"
    )
    limit = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > limit:
        raise ValueError(
            f"policy data: expected at most {limit / 2**30:.1f} GiB ({MEMORY_SHARE:.0%} of this machine's memory), "
            f"found {needed / 2**30:.1f} GiB; lower config.policy.image_size or use fewer episodes"
        )
    arrays = EpisodeArrays(
        offsets,
        config.data.every,
        images=np.empty((total, size, size, 3), np.uint8),
        actions=np.zeros((int(offsets[-1]), config.policy.action_dim), np.float32),
        states=np.zeros((int(offsets[-1]), config.policy.state_dim), np.float32) if config.policy.state_dim else None,
        latents=np.empty((total, width), np.float32) if reader.with_latents else None,
    )
    watched = set(roles.video)
    for number, (reference, row) in enumerate(roles.all):
        if (reference, row) not in watched:
            span = slice(offsets[number], offsets[number + 1])
            arrays.actions[span] = stores[reference].actions(row)
            if arrays.states is not None:
                arrays.states[span] = _states(stores[reference], row, config.policy.state_dim)
    with progress(total, 0, "frames") as bar:
        bar.unit = "frame"
        for number, episode in enumerate(roles.all):
            span = slice(frames[number], frames[number + 1])
            arrays.images[span], latents = reader.episode(*episode)
            if arrays.latents is not None:
                arrays.latents[span] = latents
            bar.update(span.stop - span.start)
    return arrays


def identity_of(config: ConfigDict, roles: Roles, datasets: Datasets) -> dict[str, Any]:
    """What determines the content of the arrays, for the position of an interrupted training run."""
    return {
        "observation": config.observation,
        "observed": config.observed.to_dict(),
        "resize": config.policy.resize,
        "datasets": {reference: store.digest for reference, store in datasets.stores.items()},
        "labelled": [list(episode) for episode in roles.labelled],
    }


def observed_by(config: ConfigDict, datasets: Datasets, observer: ObservationModel | None) -> dict[str, Any]:
    """The values of `config.observed`: the size of the frames, and the networks they pass through."""
    size = next(iter(datasets.stores.values())).image_size[0]
    if observer is None:
        return {"image_size": size, "backbone": "", "image_decoder": ""}
    decoder = fingerprint(observer.model.image_decoder) if config.observation == "decoded" else ""
    return {"image_size": size, "backbone": observer.fingerprint, "image_decoder": decoder}


def _states(store: EpisodeStore, row: int, width: int) -> np.ndarray:
    states = store.episode(row).state
    recorded = 0 if states is None else states.shape[1]
    if states is None or recorded != width:
        raise ValueError(f"config.policy.state_dim: expected {recorded}, the width of {store.reference}, found {width}")
    return states


def _to_bytes(images: jax.Array) -> jax.Array:
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _in_batches(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Apply the function to all rows, in calls of one size; the last call is padded with the last row."""
    out = []
    for begin in range(0, len(arrays[0]), BATCH):
        which = np.minimum(np.arange(begin, begin + BATCH), len(arrays[0]) - 1)
        out.append(np.asarray(function(*(array[which] for array in arrays))))
    return np.concatenate(out)[: len(arrays[0])]
