"""Brings batches of the host to the device on CUDA streams of their own, while the device computes.

Shape suffixes: N sequences, T tokens, D hidden size, B batch.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

AHEAD = 2  # batches that the host may send before the device has computed with an earlier one


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
