"""Provenance of a run: config, command line, git revision, package versions, machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def provenance(config: ConfigDict) -> dict[str, Any]:
    """Provenance of this run: config, command line, git revision, package versions, machine."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = "unknown"
    devices, hosts = jax.devices(), jax.process_count()
    return {
        "config": config.to_json_best_effort(),
        "command": " ".join(sys.argv),
        "git": git,
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{len(devices)} x {devices[0].device_kind}, {hosts} x {os.cpu_count()} cores",
    }
