"""Several processes of this machine as a cluster, as tests/test_hosts.py needs them; as a script, one of them.

argv: tensor axis, seconds, coordinator, number of processes, process id. Prints as JSON what the process saw.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
ROWS = 8
PATIENCE_S = 1200  # for processes that share a busy machine's cores
# constant rates, so that a run in two parts is the whole run; the image decoder would be most of the compilation
RECIPE: dict[str, Any] = {
    "objectives.image_decoder.enabled": False,
    "objectives.denoiser.start_step": 0,
    "optimizer.decay": "constant",
    "data.source": "frames",
}


def free_port() -> int:
    """A free port."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def together(commands: list[list[str]], devices: int) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of Python commands that run at once, with `devices` CPU devices each."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    # processes that share a busy machine's cores reach a collective minutes apart
    flags += " --xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    deadline = time.monotonic() + PATIENCE_S
    with contextlib.ExitStack() as stack:
        # files, not pipes: a process whose pipe is not read yet would block the others
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        running = [
            subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
            for command, (stdout, stderr) in zip(commands, files, strict=True)
        ]
        try:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0))
        finally:
            for process in running:
                process.kill()
                process.wait()
        texts = [[(file.seek(0), file.read())[1] for file in pair] for pair in files]
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]


def launch_together(processes: int, devices: int, module: str, *arguments: str) -> list[tuple[int, str]]:
    """(exit status, stderr) of each process of a launcher."""
    command = ["-m", module, *arguments, "--distributed"]
    command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    results = together([[*command, f"--process_id={i}"] for i in range(processes)], devices)
    return [(status, stderr) for status, _, stderr in results]


def all_well(outcomes: list[tuple[int, str]]) -> None:
    """Fail with the last lines of the first process that failed."""
    for status, text in sorted(outcomes, key=lambda outcome: outcome[0] != 1):  # the others failed because of it
        assert status == 0, f"status {status} among {[s for s, _ in outcomes]}:\n{text[-6000:]}"


def train_together(
    processes: int, devices: int, root: Path, workdir: Path, overrides: dict[str, Any]
) -> list[tuple[int, str]]:
    """(exit status, stderr) of each process of `launch.train`: the debug recipe on the dataset in `root`."""
    settings = {"data.root": root, "data.token_root": root / "tokens", "logging.tensorboard": False} | overrides
    arguments = ["--config=configs/pusht.py:debug", f"--workdir={workdir}"]
    arguments += [f"--config.{name}={value}" for name, value in settings.items()]
    return launch_together(processes, devices, "launch.train", *arguments)


def look_together(processes: int, devices: int, tensor: int, late: int) -> list[dict[str, Any]]:
    """What each process saw (`look`)."""
    command = ["-m", "tests.tools.multi_process", str(tensor), str(late), f"localhost:{free_port()}", str(processes)]
    results = together([[*command, str(i)] for i in range(processes)], devices)
    assert [status for status, *_ in results] == [0] * processes, results
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in results]


def look(tensor: int, late: int) -> dict[str, Any]:
    """Feed a batch, place parameters, wait for work that process 0 does, on a mesh over all processes.

    The last process comes `late` seconds after the others to the first program that they run together.
    """
    import jax
    import jax.numpy as jnp

    from rlawm_jax import hosts, sharding

    sharding.MIN_SPLIT_SIZE = 1
    mesh = sharding.make_mesh(1, -1, tensor)
    index, count = sharding.batch_share(mesh)
    share = ROWS // count
    rows = np.arange(index * share, (index + 1) * share, dtype=np.float32)
    batch = sharding.shard_batch({"rows": rows}, mesh)
    kernel = np.arange(ROWS * ROWS, dtype=np.float32).reshape(ROWS, ROWS)
    placed = sharding.place({"query": {"kernel": kernel}}, mesh)
    placed = sharding.place(placed, mesh)  # where they are already
    time.sleep(late if jax.process_index() == jax.process_count() - 1 else 0)
    whole = np.asarray(sharding.gather(placed)["query"]["kernel"])
    out = jax.jit(lambda x, w: (x @ w).sum(), out_shardings=sharding.replicated(mesh))
    began = time.monotonic()
    worked = []
    for _ in range(2):  # processes are released twice, too
        hosts.on_first_process(lambda: (time.sleep(0.3), worked.append(1)))
    return {
        "processes": jax.process_count(),
        "share": [index, count],
        "sum": float(out(batch["rows"], placed["query"]["kernel"])),
        "alone": float(jnp.asarray(np.arange(ROWS, dtype=np.float32) @ kernel).sum()),
        "whole": bool((whole == kernel).all()),
        "piece": placed["query"]["kernel"].addressable_shards[0].data.size,
        "worked": len(worked),
        "waited": time.monotonic() - began,
        "exchanged": hosts.exchange([f"process {jax.process_index()}"] * jax.process_index()),
    }


if __name__ == "__main__":
    from rlawm_jax.hosts import join

    join(sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    print(json.dumps(look(int(sys.argv[1]), int(sys.argv[2]))))
