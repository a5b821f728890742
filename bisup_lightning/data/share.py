"""What one of several processes holds of the calibration text, and how they add up what each found in its part.

Sequence n of the text stands in lane n mod B, B the batch size, and every batch takes one sequence of each lane. So a
process that holds some of the lanes holds its part of every batch, and never needs another sequence.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bisup_lightning.errors import first_line


class PeerLost(RuntimeError):
    """Another process ended while this one waited for it."""


@dataclass(frozen=True)
class Share:
    """One of `members` processes that hold the same model and equal parts of the text; by itself, all of it.

    Args:
        member: Which one this is.
        members: How many there are; they divide the batch size, which divides the number of sequences.
        group: How they speak to each other; None for a process by itself.
    """

    member: int = 0
    members: int = 1
    group: dist.ProcessGroup | None = None

    def lanes(self, batch_size: int) -> range:
        """The lanes that are held here."""
        count = batch_size // self.members
        return range(self.member * count, (self.member + 1) * count)

    def of(self, x_NT: Tensor, batch_size: int) -> Tensor:
        """The rows of a tensor [N, …] that belong here, in their order."""
        if self.members == 1:
            return x_NT
        lanes = self.lanes(batch_size)
        lane_N = torch.arange(len(x_NT), device=x_NT.device) % batch_size
        return x_NT[(lane_N >= lanes.start) & (lane_N < lanes.stop)]

    def gather(self, x_NT: Tensor, batch_size: int) -> Tensor | None:
        """All rows, of all members, on the host of the first of them; None to the others."""
        if self.members == 1:
            return x_NT
        whole_NT: Tensor | None = None
        if self.member == 0:
            whole_NT = torch.empty(len(x_NT) * self.members, *x_NT.shape[1:], dtype=x_NT.dtype)
        # Batch by batch: the first one's device may have no room for what all hold together.
        for batch, x_BT in enumerate(x_NT.split(batch_size // self.members)):
            x_BT = x_BT.cpu()  # where it goes; the streams of some members may be on a device, those of others not
            parts = None if whole_NT is None else [torch.empty_like(x_BT) for _ in range(self.members)]
            with waiting_for_peers():
                dist.gather(x_BT.contiguous(), parts, group=self.group, group_dst=0)
            if whole_NT is not None and parts is not None:
                whole_NT[batch * batch_size : (batch + 1) * batch_size] = torch.cat(parts)
        return whole_NT

    def agree(self, opinion: bool, device: torch.device) -> bool:
        """The first member's opinion, which all members get."""
        if self.members == 1:
            return opinion
        vote = torch.tensor(float(opinion and self.member == 0), device=device)
        self.sum_([vote])
        return bool(vote.item())

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over the members, in a single message.

        All members get the same bits.
        """
        if self.members > 1:
            self._reduce(list(tensors), dist.ReduceOp.SUM)

    def max_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype by their elementwise maxima over the members, in a single message."""
        if self.members > 1:
            self._reduce(list(tensors), dist.ReduceOp.MAX)

    def _reduce(self, tensors: list[Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with waiting_for_peers():
            dist.all_reduce(flat, operation, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


WHOLE = Share()


@contextmanager
def waiting_for_peers() -> Iterator[None]:
    """Turn what a broken connection raises, which differs from backend to backend, into one error.

    Raises:
        PeerLost: If a peer is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(first_line(error)) from error
