"""The processes of a pod or cluster: how they find each other, and which of them does work that is done only once.

A process belongs to a cluster only if it is started with --distributed.
"""

import contextlib
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import distributed

_calls = itertools.count()
PATIENCE_S = 24 * 3600  # how long processes wait for work that one of them does for all
GRACE_S = 20  # how long a failed process waits for others to fail as well


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connect the processes of a job; call it before anything else touches jax.

    Cloud TPU, GKE, Slurm and Open MPI jobs are recognised and need no arguments; elsewhere all three are needed.
    Raises a one-line ValueError if the processes cannot find each other.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given) and None in given:
        raise ValueError(
            f"--coordinator, --num_processes, --process_id: expected all three or none (on Cloud TPU, GKE, Slurm), "
            f"found {coordinator}, {num_processes}, {process_id}"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id: expected 0 to {num_processes - 1} (num_processes - 1), found {process_id}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except Exception as error:  # grpc, environment and argument errors have many types
        raise ValueError(
            f"--distributed: expected a Cloud TPU, GKE, Slurm or Open MPI job, or --coordinator=HOST:PORT "
            f"--num_processes=N --process_id=I; found: {str(error).strip().splitlines()[0]}"
        ) from error


def joined() -> bool:
    """Whether this process belongs to a cluster."""
    return jax.distributed.is_initialized()


def leave(status: int) -> NoReturn:
    """End a failed process; in a cluster the others notice within their heartbeat and end too.

    If all processes fail in the same way, each gets a moment to report its error.
    """
    if not joined():
        sys.exit(status)
    # a normal exit would wait for processes that are waiting for this one
    sys.stdout.flush()
    sys.stderr.flush()
    client: Any = distributed.global_state.client
    with contextlib.suppress(Exception):  # the others are busy, or gone
        client.wait_at_barrier("rlawm_jax/leave", GRACE_S * 1000)
    if jax.process_index() == 0:
        time.sleep(1)  # processes that lose the coordinator are aborted, so it ends last
    os._exit(status)


def on_first_process(work: Callable[[], Any]) -> None:
    """Do `work` on process 0 while the others wait, without using a device and so without a device time-out.

    Every process must make the same calls in the same order.
    """
    if jax.process_index() == 0:
        work()
    if jax.process_count() > 1:
        client: Any = distributed.global_state.client
        client.wait_at_barrier(f"rlawm_jax/once/{next(_calls)}", PATIENCE_S * 1000)


def compiled(function: jax.stages.Wrapped, *args: Any) -> jax.stages.Compiled:
    """`function` compiled for these arguments; returns once every process has compiled it, so that all run it together.

    Compile times differ, and the first process to reach a collective waits only as long as its library allows (gloo on
    CPUs: 30 s for the first of each group of devices). Every process must make the same calls in the same order.
    """
    program = function.lower(*args).compile()
    on_first_process(lambda: None)
    return program


def exchange(value: Any) -> list[Any]:
    """The values that all processes pass in, by process index; sent through the coordinator, so only for small values.

    Every process must make the same calls in the same order.
    """
    if jax.process_count() == 1:
        return [value]
    client: Any = distributed.global_state.client
    name = f"rlawm_jax/exchange/{next(_calls)}"
    client.key_value_set_bytes(f"{name}/{jax.process_index()}", pickle.dumps(value))
    values = (client.blocking_key_value_get_bytes(f"{name}/{i}", PATIENCE_S * 1000) for i in range(jax.process_count()))
    return [pickle.loads(one) for one in values]
