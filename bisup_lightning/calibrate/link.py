"""Messages between two processes."""

from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from bisup_lightning.data.share import waiting_for_peers

MESSAGE = 64 * 2**20  # bytes that travel at a time, so that they leave while others are still computed


class Link:
    """Messages to one other process, or from one, in order.

    Args:
        peer: Its rank.
        group: A group of these two, for this direction alone: NCCL carries out a group's messages one by one, and two
            processes that send to each other must not wait for one another.
        device: Where messages leave and arrive: a GPU for NCCL, the host for gloo.
    """

    def __init__(self, peer: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.peer, self.group, self.device = peer, group, device
        self._sent: deque[tuple[Tensor, list[dist.Work]]] = deque()
        self._expected: Iterator[Tensor] = iter(())
        self._arriving: tuple[Tensor, list[dist.Work]] | None = None

    def send(self, x: Tensor) -> None:
        """Send a tensor, which must not be changed until `flush`."""
        x = x.to(self.device).contiguous()
        with waiting_for_peers():
            self._sent.append((x, [dist.isend(part, self.peer, group=self.group) for part in _parts(x)]))  # type: ignore[misc]

    def flush(self, keep: int = 0) -> None:
        """Wait until no more than `keep` messages are on their way."""
        with waiting_for_peers():
            while len(self._sent) > keep:
                _, works = self._sent.popleft()
                for work in works:
                    work.wait()

    def expect(self, messages: Iterator[Tensor]) -> None:
        """Name all messages to come by empty tensors of their shape; one is received ahead of its use."""
        self._expected = messages
        self._post()

    def _post(self) -> None:
        x = next(self._expected, None)
        with waiting_for_peers():
            self._arriving = x if x is None else (x, [dist.irecv(p, self.peer, group=self.group) for p in _parts(x)])  # type: ignore[misc]

    def receive(self) -> Tensor:
        """The next message."""
        assert self._arriving is not None
        x, works = self._arriving
        with waiting_for_peers():
            for work in works:
                work.wait()
        self._post()
        return x


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, MESSAGE // max(1, x[0].nbytes)))
