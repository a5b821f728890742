"""Signals that ask a run to end: what is at hand is saved, then the process exits as the signal's convention has it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment


class Interrupted(BaseException):
    """A signal asked the run to end. No Exception, so that nothing on the way takes it for an error to be mended.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class Signals:
    """Hears the signals that ask a run to end, while a `with` block lasts.

    They are SIGINT and SIGTERM, and on SLURM SIGUSR1: pre-emption, after which the job goes back into the queue.
    A first signal raises `Interrupted` at once, or, while `defer` is on, as soon as `check` is called: training defers,
    so that no step is cut in two, and checks after each. A second one ends the process on the spot. What lies on disk
    is whole at any moment; saving on a signal only spares work.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._until: Callable[[], None] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread may change handlers
            wanted = [signal.SIGINT, signal.SIGTERM]
            if SLURMEnvironment.detect():
                wanted.append(signal.SIGUSR1)
            self._previous = {signum: signal.signal(signum, self._hear) for signum in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if self._until is not None:
            if self.received is None:
                threading.Thread(target=self._end, args=(self._until, signum), daemon=True).start()
            self.received = signum
            return
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
        if not self._deferred:
            raise Interrupted(signum)

    @staticmethod
    def _end(until: Callable[[], None], signum: int) -> None:
        try:
            until()
        finally:  # also where the first process, and with it what all know, is gone
            os._exit(128 + signum)

    def follow(self, until: Callable[[], None]) -> None:
        """From now on, a signal ends the process once `until` returns, whatever it is waiting for.

        So end the processes that have nothing to save, when the one that has is done.
        """
        self._until = until

    def defer(self) -> None:
        """From now on, a signal waits for `check`.

        A Trainer that fits puts a handler of its own before this one's, which would end an epoch without saving: that
        one is taken out again, and what it replaced comes back when the Trainer has ended.
        """
        self._deferred = True
        for signum in self._previous:
            signal.signal(signum, self._hear)

    def check(self) -> None:
        """Raise for a signal that has waited.

        Raises:
            Interrupted: If there is one.
        """
        if self.received is not None and self._until is None:
            raise Interrupted(self.received)

    def resume(self) -> None:
        """From now on, a signal raises at once; so does one that has waited.

        Raises:
            Interrupted: If there is one.
        """
        self._deferred = False
        self.check()


def requeue() -> None:
    """Put this SLURM job back into the queue, as Lightning does for a Trainer alone; say so if that fails."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    else:
        job = os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"job {job} can't be put back into the queue: {error}", file=sys.stderr)
