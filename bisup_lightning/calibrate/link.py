"""Messages between two processes."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bisup_lightning.data.share import waiting_for_peers

MESSAGE = 64 * 2**20  # bytes that NCCL or gloo is given at a time
POLL_SECONDS = 2e-3


class Board(Protocol):
    """Where processes announce things to each other (`Ranks`)."""

    def announce(self, key: str, value: str = "") -> None:
        """Let all know something."""

    def heard(self, key: str) -> bool:
        """Whether something was announced."""


@dataclass
class _Parcel:
    number: int
    tensor: Tensor
    ready: torch.cuda.Event | None  # when its numbers are there
    delivered: Future[None]


class Link:
    """Messages to one other process, or from one, in order.

    A message is not given to NCCL before the other process asks for it. A transfer that waits for its other half would
    hold on to multiprocessors of the GPU, which then lack in every product that is computed meanwhile.

    Args:
        peer: Its rank.
        group: A group of these two, for this direction alone: NCCL carries out a group's messages one by one, and two
            processes that send to each other must not wait for one another.
        device: Where messages leave and arrive: a GPU for NCCL, the host for gloo.
        board: Where a message is asked for.
        name: Of this direction, on the board.
    """

    def __init__(
        self, peer: int, group: dist.ProcessGroup | None, device: torch.device, board: Board, name: str
    ) -> None:
        self.peer, self.group, self.device = peer, group, device
        self._board, self._name = board, name
        self._asked = self._given = 0
        self._waiting: queue.SimpleQueue[_Parcel] = queue.SimpleQueue()
        self._sent: deque[Future[None]] = deque()
        self._expected: Iterator[Tensor] = iter(())
        self._courier: threading.Thread | None = None

    def connect(self, sending: bool) -> None:
        """Exchange a first message; NCCL connects two processes where both wait for it, so all links take turns."""
        hello = torch.zeros(1, device=self.device)
        with waiting_for_peers():
            if sending:
                dist.send(hello, self.peer, group=self.group)
            else:
                dist.recv(hello, self.peer, group=self.group)

    def send(self, x: Tensor) -> Future[None]:
        """Send a tensor, which must not be changed until it is delivered."""
        x, ready = x.to(self.device).contiguous(), None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        parcel = _Parcel(self._given, x, ready, Future())
        self._given += 1
        self._sent.append(parcel.delivered)
        self._waiting.put(parcel)
        if self._courier is None:  # a daemon: a process that fails does not wait for what nobody asks for any more
            self._courier = threading.Thread(target=self._deliver, name=f"link {self._name}", daemon=True)
            self._courier.start()
        return parcel.delivered

    def _deliver(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        while self._hand_over(self._waiting.get(), stream):  # which leaves no message behind in memory
            pass

    def _hand_over(self, parcel: _Parcel, stream: torch.cuda.Stream | None) -> bool:
        """Send a message once it is asked for; whether that worked."""
        try:
            while not self._board.heard(self._key(parcel.number)):
                time.sleep(POLL_SECONDS)
            with nullcontext() if stream is None else torch.cuda.stream(stream), waiting_for_peers():
                if stream is not None and parcel.ready is not None:
                    stream.wait_event(parcel.ready)
                for work in [dist.isend(part, self.peer, group=self.group) for part in _parts(parcel.tensor)]:
                    assert work is not None
                    work.wait()
            if stream is not None:
                stream.synchronize()
        except Exception as error:  # raised again where its delivery is waited for
            parcel.delivered.set_exception(error)
            return False
        parcel.delivered.set_result(None)
        return True

    def _key(self, number: int) -> str:
        return f"link/{self._name}/{number}"

    def flush(self) -> None:
        """Wait until all is delivered."""
        while self._sent:
            self._sent.popleft().result()

    def expect(self, messages: Iterator[Tensor]) -> None:
        """Name all messages to come by empty tensors of their shape."""
        self._expected = messages

    def receive(self) -> Tensor:
        """The next message."""
        x = next(self._expected)
        self._board.announce(self._key(self._asked))
        self._asked += 1
        with waiting_for_peers():
            for work in [dist.irecv(part, self.peer, group=self.group) for part in _parts(x)]:
                assert work is not None
                work.wait()
        return x


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, MESSAGE // max(1, x[0].nbytes)))
