"""Messages between two processes."""

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from bisup_lightning.data.share import PeerLost, waiting_for_peers
from bisup_lightning.data.transfer import side_stream
from bisup_lightning.errors import first_line

MESSAGE = 256 * 2**20  # bytes of a part; each waits for a long product of the sender's to end
POLL_SECONDS = 5e-3


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
    computed: torch.cuda.Event | None  # when its numbers are there
    delivered: Future[None]


class Link:
    """Messages to one other process, or from one, in order.

    NCCL is given a message when both sides are there for it: the receiver asks, the sender answers when the numbers are
    computed. A transfer that waits for its other half would hold on to multiprocessors of the GPU, which then lack in
    every product that is computed meanwhile. A message waits where it was made and travels part by part, so that a
    stream off the device takes no more of it than two parts.

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
        self._waiting: queue.SimpleQueue[_Parcel | None] = queue.SimpleQueue()
        self._last: Future[None] | None = None
        self._expected: Iterator[Tensor] = iter(())
        self._coming: Tensor | None = None
        self._courier: threading.Thread | None = None
        self._stopped = threading.Event()

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
        computed = None
        if x.is_cuda:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(x.device))
        parcel = _Parcel(self._given, x, computed, Future())
        self._given += 1
        self._last = parcel.delivered
        self._waiting.put(parcel)
        if self._courier is None:
            self._courier = threading.Thread(target=self._deliver, name=f"link {self._name}", daemon=True)
            self._courier.start()
        return parcel.delivered

    def stop(self) -> None:
        """Deliver no more. A thread that still asks the store would abort the process when it ends."""
        self._stopped.set()
        self._waiting.put(None)
        if self._courier is not None:
            self._courier.join(timeout=1.0)

    def flush(self) -> None:
        """Wait until all is delivered: the last, as messages go in order and fail with one before them."""
        if self._last is not None:
            self._last.result()

    def _deliver(self) -> None:
        stream = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
            stream = side_stream(f"link {self._name}", self.device)
        failure: PeerLost | None = None
        while (parcel := self._waiting.get()) is not None:
            try:
                if failure is not None:
                    raise failure
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    self._hand_over(parcel)
            except PeerLost as error:  # raised again where its delivery is waited for, and that of all behind it
                failure = error
                parcel.delivered.set_exception(error)
            except Exception as error:  # the peer waits for what won't come, and soon this process for its own
                print(f"error: hidden states could not be sent on: {first_line(error)}", file=sys.stderr, flush=True)
                os._exit(1)
            else:
                parcel.delivered.set_result(None)
            del parcel  # leaves no message behind in memory

    def _hand_over(self, parcel: _Parcel) -> None:
        while not self._board.heard(self._key("asked", parcel.number)):
            if self._stopped.wait(POLL_SECONDS):
                raise PeerLost("the run ended before a message was asked for")
        if parcel.computed is not None:
            parcel.computed.synchronize()
        self._board.announce(self._key("ready", parcel.number))
        with waiting_for_peers():
            for part in _parts(parcel.tensor):
                dist.send(part.to(self.device).contiguous(), self.peer, group=self.group)
                if self.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()

    def expect(self, messages: Iterator[Tensor]) -> None:
        """Name all messages to come by meta tensors of their shape."""
        self._expected = messages

    def receive(self) -> Tensor:
        """The next message; it is still to come if there is no memory for it."""
        if self._coming is None:
            self._coming = next(self._expected)
        x = torch.empty_like(self._coming, device=self.device)
        self._board.announce(self._key("asked", self._asked))
        if self.device.type == "cuda":
            while not self._board.heard(self._key("ready", self._asked)):
                time.sleep(POLL_SECONDS)
        self._asked += 1
        with waiting_for_peers():
            for part in _parts(x):
                dist.recv(part, self.peer, group=self.group)
        self._coming = None
        return x

    def _key(self, what: str, number: int) -> str:
        return f"link/{self._name}/{number}/{what}"


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, MESSAGE // max(1, x[0].nbytes)))
