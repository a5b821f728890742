"""Time as the device sees it."""

import itertools
import time
from collections import defaultdict
from typing import Any

import torch


class Stopwatch:
    """Seconds between one lap and the next, by the device's own clock: the host may be ahead of it.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """End a part of the work."""
        self._marks.append((name, self._now()))

    def wait(self) -> None:
        """Wait until the device has come to the last mark."""
        if self._on_gpu:
            self._marks[-1][1].synchronize()

    @property
    def laps(self) -> dict[str, float]:
        """Seconds of each part, of all that have the same name; waits for the last."""
        self.wait()
        laps: dict[str, float] = defaultdict(float)
        for (_, last), (name, now) in itertools.pairwise(self._marks):
            laps[name] += last.elapsed_time(now) / 1000 if self._on_gpu else now - last
        return dict(laps)
