"""One process at a time in a run directory."""

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bisup_lightning.errors import UserError
from bisup_lightning.run_layout import OWNER

HEARTBEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which an owner on another host counts as dead


class RunLock:
    """Keeps other processes out of a run directory while a `with` block lasts.

    The directory itself is locked, which leaves no trace in it, and which the kernel undoes when a process dies in
    whatever way. File systems that know no such locks, or do not share them between hosts, are covered by the owner's
    sign of life: a file that `claim` writes and renews. An owner that is silent for a minute is dead, and its run is
    taken over.

    Args:
        run_dir: The directory; need not exist before `claim`.

    Raises:
        UserError: On entry or from `claim`, if another process works there; names it and its age.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.owner = run_dir, run_dir / OWNER
        self._descriptor: int | None = None
        self._pulse: threading.Thread | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        if self.run_dir.is_dir():
            try:
                self._lock()
            except UserError:
                self._unlock()
                raise
        return self

    def claim(self) -> None:
        """Say in the directory, which is made if it is missing, that this process works there from now on."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir: {self.run_dir} can't be made: {error.strerror}; name another") from error
        if self._descriptor is None:
            self._lock()
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self.owner.write_text(json.dumps(who), encoding="utf-8")
        self._pulse = threading.Thread(target=self._show_life, daemon=True)
        self._pulse.start()

    def _lock(self) -> None:
        self._descriptor = os.open(self.run_dir, os.O_RDONLY)
        locked = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self._refusal()}; wait until it ends, or name another directory") from error
        except OSError:
            locked = False  # a file system without such locks: the sign of life alone decides
        with suppress(OSError, ValueError, KeyError, TypeError):  # no owner, or none that can be read
            silent_for = time.time() - self.owner.stat().st_mtime
            elsewhere = json.loads(self.owner.read_text(encoding="utf-8"))["host"] != socket.gethostname()
            if (elsewhere or not locked) and silent_for < SILENCE:
                raise UserError(f"{self._refusal()}; if it is dead, try again in {SILENCE:.0f} s")

    def _refusal(self) -> str:
        try:
            owner = json.loads(self.owner.read_text(encoding="utf-8"))
            age = time.time() - owner["since"]
            who = f"process {owner['pid']} on {owner['host']}, which started {age:.0f} s ago"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return f"run_dir: {self.run_dir} is in use by {who}"

    def _show_life(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            with suppress(OSError):  # a vanished disk shows elsewhere
                os.utime(self.owner)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pulse is not None:
            self._ended.set()
            self._pulse.join()
            self.owner.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
