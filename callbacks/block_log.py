"""The run's course at a glance: one point for each block."""

import csv
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.tensorboard import SummaryWriter

from bisup_lightning.calibrate.block_result import BlockResult
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback


class BlockLog(WalkCallback):
    """Adds a row for each learned block to `logs/blocks.csv`, and points to TensorBoard's curves in `logs/blocks/`.

    A run without a logger has none of it. A block that an interrupted run repeats has its last row count.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.writer: SummaryWriter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether the run is logged at all."""
        self.wanted = bool(trainer.loggers)

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        """Write loss before and after, relative error, seconds (each phase's too), tokens per second, device memory."""
        if not self.wanted:
            return
        figures = {name: value for name, value in result.metrics().items() if name != "phases"}
        figures |= {f"seconds/{phase}": seconds for phase, seconds in result.phases.items()}
        figures["tokens_per_second"] = walk.inputs.num_tokens / result.seconds
        if walk.model.device.type == "cuda":
            figures["device_memory_gib"] = torch.cuda.max_memory_allocated(walk.model.device) / 2**30
        logs = walk.store.run_dir / "logs"
        _append(logs / "blocks.csv", figures)
        self.writer = self.writer or SummaryWriter(logs / "blocks", flush_secs=10)  # by a thread of its own
        for name, value in figures.items():
            if name != "index":
                self.writer.add_scalar(f"block/{name}", float(value), result.index)

    def on_walk_end(self, walk: BlockWalk) -> None:
        """Close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()


def _append(path: Path, row: dict[str, float | int | bool]) -> None:
    """Add a row under the columns that are there: a run that goes on with more processes has others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        writer = csv.DictWriter(file, header or list(row), restval="", extrasaction="ignore")
        if header is None:
            writer.writeheader()
        writer.writerow(row)
