"""Where the streams of hidden states live: on the device, on the host, or in a file that the host maps.

Shape suffixes: N sequences, T tokens, D hidden size.
"""

import mmap
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Streams = Literal["auto", "device", "host", "file"]
StreamLocation = Literal["device", "host", "file"]
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StreamStorage:
    """Allocates the tensors that hold streams, all of them in one kind of memory.

    Args:
        place: `device`; `host`, pinned where the device is a GPU; or `file`.
        device: Where blocks compute.
        folder: Where files are made. They have no name, so that even a killed process leaves none.
    """

    place: StreamLocation
    device: torch.device
    folder: Path

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor.

        Raises:
            OSError: If the disk has no room for a file.
        """
        if self.place == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.place == "host":
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        size = shape.numel() * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process when it is written to
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)

    def empty_like(self, x: Tensor) -> Tensor:
        """An uninitialized tensor of the shape and dtype of another; see `empty`."""
        return self.empty(x.shape, x.dtype)

    def copy(self, x_NTD: Tensor) -> Tensor:
        """A copy [N, T, D] in this storage."""
        return self.empty_like(x_NTD).copy_(x_NTD)

    def hold(self, x_NTD: Tensor) -> Tensor:
        """A tensor of the same values in this storage: the given one if it lies here already, else a copy."""
        if self.place == "device":
            return x_NTD.to(self.device)
        if self.place == "host" and (self.device.type == "cpu" or x_NTD.is_pinned()):
            return x_NTD.cpu()
        return self.copy(x_NTD)


def choose_place(wanted: Streams, size: int, device: torch.device) -> StreamLocation:
    """Where streams live: as wanted, or in the fastest memory with room to spare.

    Args:
        wanted: The setting.
        size: Bytes of one stream. A block's calibration holds three of them (x_fp, x_q, and the block's output on x_q),
            and a fourth where the block learns on full-precision inputs first.
        device: Where blocks compute.
    """
    if wanted == "device" and device.type == "cpu":
        return "host"
    if wanted != "auto":
        return wanted
    if device.type == "cuda" and 6 * size < torch.cuda.mem_get_info(device)[0]:
        return "device"
    free = free_host_bytes()
    return "host" if free is None or 4 * size < free else "file"


def free_host_bytes() -> int | None:
    """Host memory that this process could still have, within the limit of its control group; None if unknown."""
    try:
        free = _figure(MEMINFO, r"MemAvailable:\s+(\d+) kB") * 1024
    except (OSError, ValueError):
        return None
    try:
        limit = _figure(CGROUP / "memory.max", r"(\d+)")
        return min(free, limit - _figure(CGROUP / "memory.stat", r"anon (\d+)"))  # the rest is cache, which gives way
    except (OSError, ValueError):  # no control group, or no limit
        return free


def _figure(path: Path, pattern: str) -> int:
    found = re.search(pattern, path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} has no {pattern}")
    return int(found[1])
