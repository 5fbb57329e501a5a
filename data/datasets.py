"""The single access point to recorded data: a run's datasets, opened once, and every frame or token read from them.

Windows for training and evaluation, the frames for cloning a policy, and the demonstrations for reinforcement learning
all come from `Datasets`, so that each is opened, checked, masked and cached in the same way.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from data.episodes import EpisodeStore
from data.tokens import EncodeFn, TokenCache, build_token_cache, is_complete, token_cache_dir


class Datasets:
    """Datasets by reference ("name:split"), in the order given; `mask_top` is as in `masks.apply_mask`.

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
        """Cached tokens (bf16) of frames of an episode, once `open_tokens` or `compute_tokens` was called."""
        return self.caches[reference].read(self.stores[reference].frame_index(row, which))

    def check_image_size(self, size: int, field: str) -> None:
        """Raise ValueError, naming the `field` that sets `size`, if frames are not size x size pixels."""
        for store in self.stores.values():
            if store.image_size != (size, size):
                raise ValueError(
                    f"{field}: expected {store.image_size[0]} as in the frames of {store.reference}, "
                    f"found {size}; change it, or build the data with --image_size={size}"
                )

    def check_robots(self, action_dims: Mapping[str, int]) -> None:
        """Raise ValueError if a dataset has a robot that `config.denoiser.action_dims` lacks."""
        for store in self.stores.values():
            robots = {str(robot) for robot in store.robot_ids if robot >= 0}
            if missing := sorted(robots - set(action_dims)):
                raise ValueError(
                    f"config.denoiser.action_dims: expected an entry for each robot of {store.reference}, found none "
                    f"for robot {', '.join(missing)}; its actions would be ignored"
                )

    def open_tokens(self, token_root: str | Path, fingerprint: str) -> None:
        """Open the token caches of the backbone `fingerprint`; refuse missing ones, other data or another backbone."""
        self.caches = {
            reference: TokenCache(token_cache_dir(token_root, store, fingerprint), store, fingerprint)
            for reference, store in self.stores.items()
        }

    def compute_tokens(
        self,
        token_root: str | Path,
        fingerprint: str,
        make_encoder: Callable[[], EncodeFn],
        *,
        backbone: str,
        alone: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        """Compute missing tokens, finish interrupted computations, and open all caches.

        The encoder is created only if needed. `alone` does the work on one of several processes while the others
        wait; all of them read the result, so `token_root` must be a folder they share.
        """
        folders = {ref: token_cache_dir(token_root, store, fingerprint) for ref, store in self.stores.items()}
        if not all(map(is_complete, folders.values())):
            encode, settings = make_encoder(), {"backbone": backbone, "fingerprint": fingerprint}

            def compute() -> None:
                for reference, folder in folders.items():
                    build_token_cache(self.stores[reference], encode, out_dir=folder, **settings)

            alone(compute)
        self.open_tokens(token_root, fingerprint)
