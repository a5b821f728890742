"""A disk that fails: strikes at one of the operations by which a run changes what lies below a folder."""

import builtins
import errno
import functools
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from bisup_lightning import files

PATHS_LAST = ("replace", "link")  # of whose two paths the last one is written


@dataclass
class FaultyDisk:
    """Counts the operations below a folder: opening for writing, writing, syncing, renaming, making folders, …

    Args:
        folder: The folder.
        at: Which operation is struck, from 0.
        fault: An errno that it ends with, or None for SIGKILL.
        lasting: Whether all operations after it fail, too, as on a full disk.
        record: A file to write the number of operations to that were counted, and the kind of the one that was struck.
    """

    folder: Path
    at: int
    fault: int | None = None
    lasting: bool = False
    record: Path | None = None

    def install(self) -> None:
        """Take the place of what Python and safetensors offer, in this process for good."""
        self.count, self.struck = 0, ""
        self.folder = self.folder.resolve()
        self._open, self._fsync, self._save_file = io.open, os.fsync, files.save_file
        builtins.open = io.open = self._opening  # type: ignore[assignment]
        files.save_file = self._saving  # type: ignore[assignment]
        os.fsync = self._syncing
        for name in ("replace", "link", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._changing(name, getattr(os, name)))

    def _strike(self, kind: str, half: Callable[[], object] | None = None) -> None:
        """Count an operation; if it is its turn, do half of it and fail."""
        place, self.count = self.count, self.count + 1
        if self.record is not None:
            descriptor = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(descriptor, f"{self.count} {self.struck or kind}".encode())
            os.close(descriptor)
        if place == self.at or (place > self.at and self.lasting):
            self.struck = self.struck or kind
            if half is not None:
                half()
            if self.fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.fault, os.strerror(self.fault or 0))

    def _concerns(self, path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(self.folder)

    def _opening(self, file: Any, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        if mode.startswith("r") or isinstance(file, int) or not self._concerns(file):
            return self._open(file, mode, *arguments, **settings)
        self._strike("open")
        opened = self._open(file, mode, *arguments, **settings)
        write = opened.write

        def writing(content: Any) -> int:
            self._strike("write", lambda: (write(content[: len(content) // 2]), opened.flush()))
            return write(content)

        opened.write = writing
        return opened

    def _saving(self, tensors: Any, path: Any, metadata: Any = None) -> None:
        def half() -> None:
            content = safetensors.torch.save(tensors, metadata)
            with self._open(path, "wb") as file:
                file.write(content[: len(content) // 2])

        self._strike("save_file", half)
        self._save_file(tensors, path, metadata=metadata)

    def _syncing(self, descriptor: int) -> None:
        if self._concerns(descriptor):
            self._strike("fsync")
        self._fsync(descriptor)

    def _changing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def changing(*arguments: Any, **settings: Any) -> Any:
            if settings.get("dir_fd") is None and self._concerns(arguments[-1 if name in PATHS_LAST else 0]):
                self._strike(name)
            return function(*arguments, **settings)

        return changing


def kill_at(folder: Path, at: int) -> Callable[[], None]:
    """What makes a process kill itself inside the operation `at` below a folder."""
    return FaultyDisk(folder, at).install


def full_at(folder: Path, at: int, record: Path) -> Callable[[], None]:
    """What fills the disk up at that operation."""
    return FaultyDisk(folder, at, errno.ENOSPC, lasting=True, record=record).install


def broken_at(folder: Path, at: int, record: Path) -> Callable[[], None]:
    """What makes that operation fail as on a defective disk."""
    return FaultyDisk(folder, at, errno.EIO, record=record).install
