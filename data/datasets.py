"""The one door to recorded data: the datasets of a run, opened once, and every frame or token that is read from them.

Windows for training and evaluation, the frames a policy is cloned on, and the demonstrations of reinforcement learning
all come through `Datasets`, so that each is opened, checked, masked and cached in the same way.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from data.episodes import EpisodeStore
from data.tokens import EncodeFn, TokenCache, build_token_cache, is_complete, token_cache_dir


class Datasets:
    """Datasets by reference ("name:split"), in the order given; `mask_top` is that of `masks.apply_mask`.

    Raises FileNotFoundError or ValueError naming the dataset that is missing or does not fit.
    """

    def __init__(self, root: str | Path, references: Iterable[str], *, mask_top: float = 0.0) -> None:
        self.stores = {
            reference: EpisodeStore(root, reference, mask_top=mask_top) for reference in dict.fromkeys(references)
        }
        self.caches: dict[str, TokenCache] = {}

    def frames(
        self, reference: str, row: int, which: Sequence[int] | Int[np.ndarray, " n"]
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames of an episode as the model sees them: background 0 where there are masks."""
        return self.stores[reference].frames(row, [int(frame) for frame in which])

    def tokens(self, reference: str, row: int, which: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n l c"]:
        """Cached tokens (bf16) of frames of an episode; needs `open_tokens`."""
        return self.caches[reference].read(self.stores[reference].frame_index(row, which))

    def has_tokens(self, token_root: str | Path, fingerprint: str) -> bool:
        """Whether the tokens of every dataset are computed to the end."""
        return all(is_complete(token_cache_dir(token_root, store, fingerprint)) for store in self.stores.values())

    def compute_tokens(self, token_root: str | Path, fingerprint: str, encode: EncodeFn, *, backbone: str) -> None:
        """Compute the tokens of every dataset that has none yet, and finish computations that were interrupted."""
        for store in self.stores.values():
            build_token_cache(
                store,
                encode,
                backbone=backbone,
                fingerprint=fingerprint,
                out_dir=token_cache_dir(token_root, store, fingerprint),
            )

    def open_tokens(self, token_root: str | Path, fingerprint: str) -> None:
        """Open the token caches of the backbone `fingerprint`; refuses one of other data or another backbone."""
        self.caches = {
            reference: TokenCache(token_cache_dir(token_root, store, fingerprint), store, fingerprint)
            for reference, store in self.stores.items()
        }
