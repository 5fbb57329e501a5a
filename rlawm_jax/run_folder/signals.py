"""SIGTERM and Ctrl-C end training after the current step; all processes of a job agree on that step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Whether this run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def requested(self, call: int) -> bool:
        """Whether to stop after this call, the same on every process; calls are counted one by one.

        The processes of a cluster agree on the call after the latest that any of them has reached.
        """
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(call):
            self.signal = self.signal or signal.SIGTERM
            return True
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as for a process ended by a signal: schedulers restart such a job."""
        return 128 + (self.signal or signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Record SIGTERM and Ctrl-C instead of ending the process; a second one ends it as usual.

    In a cluster jax handles SIGTERM and notifies all processes; Ctrl-C ends the process, because it reaches only one.
    """
    interrupt = Interrupt()
    ours = SIGNALS if not jax.distributed.is_initialized() else SIGNALS[1:] if jax.process_count() == 1 else ()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ours}

    def note(number: int, frame: object) -> None:
        interrupt.signal = signal.Signals(number)
        signal.signal(number, before[number])

    for number in ours:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
