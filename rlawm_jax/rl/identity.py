"""What a run of reinforcement learning started from, stored with its checkpoints and compared when it resumes."""

import json
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from data.datasets import Datasets
from rlawm_jax.weights.backbone import fingerprint


def identity_of(config: ConfigDict, base: nnx.State, meta: dict[str, Any], datasets: Datasets) -> dict[str, Any]:
    """What a resumed run must find as it was, by setting; `base` is the clone, `meta` that of the world model."""
    weights = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(base)}
    bank = {name: value for name, value in config.bank.to_dict().items() if name != "limit_gib"}
    return {
        "seed": config.seed,
        "learner": config.learner,
        "policy (its weights)": fingerprint(weights),
        "world_model (its checkpoint)": f"{meta['checksum']} of step {meta['step']}",
        **{f"bank.{name}": value for name, value in bank.items()},
        "bank.datasets (their content)": {reference: store.digest for reference, store in datasets.stores.items()},
        "data.val_episodes": config.data.val_episodes,
    }


class NoBatches:
    """Placeholder batches for a run that imagines its data; their position is what it started from, by setting."""

    def __init__(self, identity: dict[str, Any]):
        self._identity = json.loads(json.dumps(identity))

    def __next__(self) -> dict[str, np.ndarray]:
        """A batch without arrays."""
        return {}

    def get_state(self) -> dict[str, Any]:
        """The state stored in a checkpoint."""
        return self._identity

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if the run started from something else; older states name the policy alone."""
        for key, mine in self._identity.items():
            if key in state and state[key] != mine:
                raise ValueError(
                    f"config.{key}: expected {state[key]}, which the run in this folder started from, found {mine}; "
                    f"correct it or choose another --workdir"
                )
