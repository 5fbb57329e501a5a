"""From datasets to the frames a policy trains on: repainted once, at the policy's size, before training starts.

Repainting costs a backbone and a decoder pass per frame; the pictures are small. Doing it once instead of in every
step makes a step hundreds of times cheaper, and needs image_size^2 x 3 bytes per frame, printed before it is allocated.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from data.cloning import Bank, Roles, picture_offsets
from data.episodes import EpisodeStore
from data.tokens import TokenCache, token_cache_dir
from rlawm_jax.models.policy import resized
from rlawm_jax.policy.observation import Eyes
from rlawm_jax.run_folder.logging import progress, say
from rlawm_jax.training.datasets import ensure_token_caches
from rlawm_jax.weights.backbone import fingerprint

BATCH = 16  # frames per call: an episode's last call is filled up, so larger ones would waste more
MEMORY_SHARE = 0.8  # of the machine's memory


def open_stores(config: ConfigDict) -> dict[str, EpisodeStore]:
    """The datasets of a policy recipe; refuses pictures of several sizes and actions the policy cannot give."""
    video = config.data.video if config.policy.rla.enabled else ()
    references = dict.fromkeys([*config.data.demonstrations, *video])
    if not config.data.demonstrations:
        raise ValueError("config.data.demonstrations: expected at least one 'name:split', found none")
    stores = {reference: EpisodeStore(config.data.root, reference) for reference in references}
    sizes = {store.reference: store.image_size for store in stores.values()}
    if len(set(sizes.values())) > 1 or any(height != width for height, width in sizes.values()):
        raise ValueError(f"config.data.demonstrations, video: expected square pictures of one size, found {sizes}")
    for reference in config.data.demonstrations:
        if stores[reference].action_dim != config.policy.action_dim:
            raise ValueError(
                f"config.policy.action_dim: expected {stores[reference].action_dim} as in {reference}, "
                f"found {config.policy.action_dim}"
            )
    return stores


class Repainter:
    """Episodes to pictures of the policy's size, and to the latent actions of its chunks."""

    def __init__(self, config: ConfigDict, stores: dict[str, EpisodeStore], eyes: Eyes | None) -> None:
        """`eyes` is the world model to look through, or None where frames are taken as they are."""
        self.stores, self.horizon, self.every = stores, config.policy.horizon, config.data.every
        self.decoded, self.with_latents = config.observation == "decoded", config.policy.rla.enabled
        self._caches: dict[str, TokenCache] = {}
        size = config.policy.image_size
        self._resize = jax.jit(lambda frames: _to_bytes(resized(frames / 255.0, size)))
        if eyes is None:
            return
        graphdef, self._weights = nnx.split(eyes.model)

        def program(function: Callable) -> Callable:
            return jax.jit(lambda weights, *args: function(nnx.merge(graphdef, weights), *args))

        # tokens travel as bfloat16, as in a token cache
        self._encode = program(lambda model, frames: model.encode(frames).astype(jnp.bfloat16))
        self._paint = program(lambda model, s: _to_bytes(resized(model.decode(s.astype(jnp.float32)), size)))
        self._latent = program(
            lambda model, s0, s1: model.latent(s0.astype(jnp.float32), s1.astype(jnp.float32)).reshape(len(s0), -1)
        )
        if eyes.config.data.source == "tokens":
            self._open_caches(config.data.token_root, eyes)

    def _open_caches(self, token_root: str, eyes: Eyes) -> None:
        """Where the world model learned from cached tokens, so does the policy; a cache that is missing is computed."""
        assert eyes.model.backbone is not None
        settings = eyes.config.copy_and_resolve_references()
        with settings.unlocked():
            settings.data.token_root = token_root
        ensure_token_caches(settings, list(self.stores.values()), eyes.model.backbone, eyes.fingerprint)
        for reference, store in self.stores.items():
            folder = token_cache_dir(token_root, store, eyes.fingerprint)
            self._caches[reference] = TokenCache(folder, store, eyes.fingerprint)

    def episode(self, reference: str, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pictures uint8 [p, s, s, 3] of every n-th frame, and the latents [p, z] of the chunks that start there."""
        store = self.stores[reference]
        length = int(store.lengths[row])
        first = np.arange(0, length, self.every)
        last = np.minimum(first + self.horizon, length - 1)
        latents = None
        if self.with_latents:
            # some frames are both the first of one chunk and the last of another
            frames, place = np.unique(np.concatenate([first, last]), return_inverse=True)
            tokens = self._tokens(reference, row, frames)
            first_tokens, last_tokens = tokens[place[: len(first)]], tokens[place[len(first) :]]
            latents = _in_batches(lambda s0, s1: self._latent(self._weights, s0, s1), first_tokens, last_tokens)
        elif self.decoded:
            first_tokens = self._tokens(reference, row, first)
        else:
            return _in_batches(self._resize, _masked(store, row, first)), None
        if not self.decoded:
            return _in_batches(self._resize, _masked(store, row, first)), latents
        return _in_batches(lambda tokens: self._paint(self._weights, tokens), first_tokens), latents

    def _tokens(self, reference: str, row: int, frames: np.ndarray) -> np.ndarray:
        store = self.stores[reference]
        if reference in self._caches:
            return self._caches[reference].read(store.frame_index(row, frames))
        return _in_batches(lambda images: self._encode(self._weights, images), _masked(store, row, frames))


def build_bank(config: ConfigDict, roles: Roles, repainter: Repainter) -> Bank:
    """Every frame of the roles' episodes as the policy will see it; prints the memory it takes, refuses too much."""
    stores, labelled = repainter.stores, len(roles.labelled)
    lengths = [int(stores[name].lengths[row]) for name, row in roles.all]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    pictures = picture_offsets(offsets, config.data.every)
    size, total, width = config.policy.image_size, int(pictures[-1]), config.policy.rla.latent_dim
    needed = total * (size * size * 3 + (4 * width if repainter.with_latents else 0))
    say(
        f"policy data: {labelled} labelled, {len(roles.video)} watched, {len(roles.validation)} held-out episodes; "
        f"{total} pictures x {size}x{size}x3 bytes = {needed / 2**20:.0f} MiB in memory"
    )
    limit = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > limit:
        raise ValueError(
            f"policy data: expected at most {limit / 2**30:.1f} GiB ({MEMORY_SHARE:.0%} of this machine's memory), "
            f"found {needed / 2**30:.1f} GiB; lower config.policy.image_size or use fewer episodes"
        )
    bank = Bank(
        offsets,
        config.data.every,
        images=np.empty((total, size, size, 3), np.uint8),
        actions=np.zeros((int(offsets[-1]), config.policy.action_dim), np.float32),
        states=np.zeros((int(offsets[-1]), config.policy.state_dim), np.float32) if config.policy.state_dim else None,
        latents=np.empty((total, width), np.float32) if repainter.with_latents else None,
    )
    watched = set(roles.video)
    for number, (reference, row) in enumerate(roles.all):
        if (reference, row) not in watched:
            span = slice(offsets[number], offsets[number + 1])
            bank.actions[span] = stores[reference].actions(row)
            if bank.states is not None:
                bank.states[span] = _states(stores[reference], row, config.policy.state_dim)
    with progress(total, 0, "pictures") as bar:
        bar.unit = "picture"
        for number, episode in enumerate(roles.all):
            span = slice(pictures[number], pictures[number + 1])
            bank.images[span], latents = repainter.episode(*episode)
            if bank.latents is not None:
                bank.latents[span] = latents
            bar.update(span.stop - span.start)
    return bank


def identity_of(config: ConfigDict, roles: Roles, stores: dict[str, EpisodeStore]) -> dict[str, Any]:
    """What decides the bank's content, for the position of an interrupted training."""
    return {
        "observation": config.observation,
        "observed": config.observed.to_dict(),
        "datasets": {reference: store.digest for reference, store in stores.items()},
        "labelled": [list(episode) for episode in roles.labelled],
    }


def observed_by(config: ConfigDict, stores: dict[str, EpisodeStore], eyes: Eyes | None) -> dict[str, Any]:
    """The values of `config.observed`: the size of the frames, and whose pictures they become."""
    size = next(iter(stores.values())).image_size[0]
    if eyes is None:
        return {"image_size": size, "backbone": "", "image_decoder": ""}
    if eyes.model.image_size != size:
        raise ValueError(
            f"config.data.root: expected pictures of {eyes.model.image_size} pixels as the world model's, found {size} "
            f"in {', '.join(stores)}; build the data with --image_size={eyes.model.image_size}"
        )
    decoder = fingerprint(eyes.model.image_decoder) if config.observation == "decoded" else ""
    return {"image_size": size, "backbone": eyes.fingerprint, "image_decoder": decoder}


def _masked(store: EpisodeStore, row: int, which: np.ndarray) -> np.ndarray:
    frames, masks = store.images(row, which.tolist())
    return frames if masks is None else frames * masks[..., None]


def _states(store: EpisodeStore, row: int, width: int) -> np.ndarray:
    states = store.episode(row).state
    found = 0 if states is None else states.shape[1]
    if states is None or found != width:
        raise ValueError(f"config.policy.state_dim: expected {found}, the width of {store.reference}, found {width}")
    return states


def _to_bytes(images: jax.Array) -> jax.Array:
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _in_batches(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Function of every row, in calls of one size; the last call is filled up with the last row."""
    out = []
    for begin in range(0, len(arrays[0]), BATCH):
        which = np.minimum(np.arange(begin, begin + BATCH), len(arrays[0]) - 1)
        out.append(np.asarray(function(*(array[which] for array in arrays))))
    return np.concatenate(out)[: len(arrays[0])]
