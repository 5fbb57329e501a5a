"""Where metrics go: JSONL always, TensorBoard and wandb by config, a progress bar or plain lines for people.

Only process 0 writes, and only numbers already on the host: nothing here makes another process wait.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

LOGGER = logging.getLogger("rlawm_jax")

METRICS_FILE = "metrics.jsonl"


def announce(message: str) -> None:
    """Print one line for people, from process 0, without breaking a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


class MetricLogger:
    """Appends metrics of a step to `workdir/metrics.jsonl` and to the sinks the config asks for."""

    def __init__(self, workdir: Path, config: ConfigDict, *, resumed_from: int):
        self.active = jax.process_index() == 0
        self._tensorboard = self._wandb = None
        if not self.active:
            return
        path = workdir / METRICS_FILE
        _drop_lines_from(path, resumed_from)
        self._file = path.open("a")
        if config.logging.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_from + 1)
        if config.logging.wandb:
            import wandb

            self._wandb = wandb.init(project=config.logging.wandb_project, config=config.to_dict(), dir=str(workdir))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers that are on the host under `step`, the count of finished steps."""
        if not self.active:
            return
        # JSON has no NaN: a non-finite number becomes null
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        """Flush and close every sink."""
        if self.active:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _drop_lines_from(path: Path, step: int) -> None:
    """Drop lines that an interrupted run logged after the checkpoint it resumes from, and truncated lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and entry.get("step", step + 1) <= step:
            kept.append(line + "\n")
    # replaced atomically: a kill here must not lose the history
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def progress(total: int, initial: int, description: str, unit: str = "step") -> tqdm:
    """A progress bar on process 0: live on a terminal, otherwise at most one line every 15 seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 15.0,
        disable=jax.process_index() != 0,
    )
