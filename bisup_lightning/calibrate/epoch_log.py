"""What becomes known of a block's epochs, for loggers and whoever watches."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from lightning.fabric.loggers import Logger
from torch import Tensor

from bisup_lightning.calibrate.stopwatch import Stopwatch

Figure = Tensor | float | Callable[[], float]


def epochs_behind(device: torch.device) -> int:
    """By how many epochs loggers are late: on a GPU, where host and device would else wait for each other."""
    return 1 if device.type == "cuda" else 0


@dataclass(frozen=True)
class Epoch:
    """An epoch that the host is done with; the device may still compute it.

    Args:
        number: From 0.
        step: The last optimizer step, from 0.
        figures: Of the epoch, by name.
        clock: Comes to its last mark when the device is done with it, too.
    """

    number: int
    step: int
    figures: Mapping[str, Figure]
    clock: Stopwatch


class EpochLog:
    """Figures of epochs on their way to the loggers.

    Attributes:
        known_loss: Mean loss of the last epoch that the loggers have heard of; the same for all processes at any epoch.
    """

    def __init__(self) -> None:
        self.known_loss: float | None = None
        self._figures: dict[str, Figure] = {}
        self._ended: list[Epoch] = []

    @property
    def diverged(self) -> bool:
        """Whether that loss is known and not finite."""
        return self.known_loss is not None and not math.isfinite(self.known_loss)

    def add(self, figures: Mapping[str, Figure]) -> None:
        """Note figures of the epoch at hand.

        Args:
            figures: Numbers, tensors of one element on the device, or what gives a number behind the epoch.
        """
        for name, x in figures.items():
            self._figures[name] = x.to("cpu", non_blocking=True) if isinstance(x, Tensor) else x

    def end(self, number: int, step: int, device: torch.device, loggers: Iterable[Logger]) -> None:
        """End the epoch, and tell the loggers of those before it that they should know of."""
        self._ended.append(Epoch(number, step, self._figures, Stopwatch(device)))
        self._figures = {}
        self.tell(loggers, epochs_behind(device))

    def tell(self, loggers: Iterable[Logger], behind: int = 0) -> None:
        """Tell the loggers of all epochs that have ended, but the last few."""
        while len(self._ended) > behind:
            epoch = self._ended.pop(0)
            epoch.clock.wait()
            figures = {name: float(x() if callable(x) else x) for name, x in epoch.figures.items()}
            self.known_loss = figures.get("loss")
            for logger in loggers:
                logger.log_metrics({**figures, "epoch": epoch.number}, epoch.step)
                logger.save()
