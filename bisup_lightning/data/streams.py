"""Where the streams of hidden states live: on the device, on the host, or in a file that the host maps.

Shape suffixes: N sequences, T tokens, D hidden size.
"""

import mmap
import os
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Streams = Literal["auto", "device", "host", "file"]
StreamLocation = Literal["device", "host", "file"]
AHEAD = 2  # batches that the host may send before the device has computed with an earlier one
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StreamStorage:
    """Makes the tensors of streams in one place.

    Args:
        place: `device`; `host`, pinned where the device is a GPU; or `file`.
        device: Where blocks compute.
        folder: Where files are made. They have no name, so that even a killed process leaves none.
    """

    place: StreamLocation
    device: torch.device
    folder: Path

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor with no particular values.

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
        """See `empty`."""
        return self.empty(x.shape, x.dtype)

    def copy(self, x_NTD: Tensor) -> Tensor:
        """Another tensor of the same values here."""
        return self.empty_like(x_NTD).copy_(x_NTD)

    def hold(self, x_NTD: Tensor) -> Tensor:
        """The same values here: a copy, unless they are here already."""
        if self.place == "device":
            return x_NTD.to(self.device)
        if self.place == "host" and (self.device.type == "cpu" or x_NTD.is_pinned()):
            return x_NTD.cpu()
        return self.copy(x_NTD)


def choose_place(wanted: Streams, size: int, device: torch.device) -> StreamLocation:
    """Where streams live: as wanted, or in the fastest memory with room to spare.

    Args:
        wanted: The setting.
        size: Bytes of one stream; a step has three: x_fp, x_q and what becomes of x_q; and one more where blocks begin
            on x_fp.
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


def pick(stream_NTD: Tensor, indices_B: Tensor, device: torch.device) -> Tensor:
    """Some sequences [B, T, D] of a stream; on the host in pinned memory, if they are to go to a GPU."""
    if stream_NTD.is_cuda or device.type == "cpu":
        return stream_NTD[indices_B]
    picked = torch.empty(len(indices_B), *stream_NTD.shape[1:], dtype=stream_NTD.dtype, pin_memory=True)
    return torch.index_select(stream_NTD, 0, indices_B, out=picked)


@cache
def side_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """One CUDA stream for each purpose: PyTorch has 32 and gives them out in turn, so that two of many may be one."""
    return torch.cuda.Stream(device)


def moved(batches: Iterable[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Batches on the device; each is copied to a GPU while it computes on the one before.

    Args:
        batches: Tensors of each batch, all on the device or all on the host, where pinned ones are copied faster.
        device: Where they shall be.
    """
    side = side_stream("copies", device) if device.type == "cuda" else None
    ahead: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None
    used: deque[torch.cuda.Event] = deque()
    for batch in batches:
        if side is None or batch[0].is_cuda:
            yield tuple(x.to(device) for x in batch)
            continue
        with torch.cuda.stream(side):
            sent = tuple(x.to(device, non_blocking=True) for x in batch)
        following = sent, side.record_event()
        if ahead is not None:
            yield _received(*ahead)
            used.append(torch.cuda.current_stream(device).record_event())
            if len(used) > AHEAD:  # each holds pinned memory and the device's
                used.popleft().synchronize()
        ahead = following
    if ahead is not None:
        yield _received(*ahead)


def _received(batch: tuple[Tensor, ...], copied: torch.cuda.Event) -> tuple[Tensor, ...]:
    current = torch.cuda.current_stream(batch[0].device)
    current.wait_event(copied)
    for x in batch:  # whose memory must not go to another copy while this stream still reads it
        x.record_stream(current)
    return batch
