"""What several tests share: a look at a folder, and callbacks that watch or disturb a run, to be named by class path.

A callback is made by the command line, so what it saw lies on its class; `Watch.fresh()` empties it.
"""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bisup_lightning.calibrate.block_result import BlockResult
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.cli import main

SOLVER = "--solver=bisup_lightning.calibrate.solvers."
RTN, GPTQ, BISUP = SOLVER + "RTN", SOLVER + "GPTQ", SOLVER + "BiSup"
QUAROT = "--transform=bisup_lightning.transform.rotate.QuaRot"
EAGER = (  # all that can be saved is saved as often as can be
    "--trainer.callbacks=[{class_path: callbacks.bf16.BF16}, {class_path: callbacks.fuse.Fuse}, "
    "{class_path: callbacks.checkpoint.BlockCheckpoint, init_args: {every_n_seconds: 0, streams_every_n_seconds: 0}}]"
)


def with_callback(callback: type) -> str:
    """The argument that adds a callback to a configuration's own; it hears of everything after them."""
    return f"--trainer.callbacks+={callback.__module__}.{callback.__name__}"


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def traces(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of a folder and all below it: equal only if nobody wrote there."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def timeless(run: Path) -> dict[str, object]:
    """results.json without what depends on the clock or the machine's memory."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for block in results["blocks"]:
        del block["seconds"], block["phases"]
    return {key: results[key] for key in ("perplexity", "blocks", "fingerprint")}


class Interrupted(RuntimeError):
    """The power is cut."""


class Interrupt(WalkCallback):
    """Ends the run at an event of a block: `at`, or where INTERRUPT_AT=event:block says by the signals INTERRUPT_BY."""

    at: ClassVar[tuple[str, int] | None] = None
    block: ClassVar[int] = -1

    def _reach(self, event: str, index: int) -> None:
        if (event, index) == self.at:
            raise Interrupted(f"{event} of block {index}")
        if os.environ.get("INTERRUPT_AT") == f"{event}:{index}":
            for name in os.environ.get("INTERRUPT_BY", "SIGKILL").split():
                os.kill(os.getpid(), signal.Signals[name])

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        Interrupt.block = index
        self._reach("on_block_start", index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self._reach("on_train_epoch_end", Interrupt.block)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reach("on_train_end", Interrupt.block)

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        self._reach("on_block_end", result.index)

    def on_walk_end(self, walk: BlockWalk) -> None:
        self._reach("on_walk_end", -1)


class CutOff(WalkCallback):
    """Ends the run behind as many training steps as are left, and counts them."""

    steps_left: ClassVar[int | None] = None
    steps_made: ClassVar[int] = 0

    def on_train_batch_end(self, *event: object) -> None:
        CutOff.steps_made += 1
        if CutOff.steps_left is not None:
            CutOff.steps_left -= 1
            if CutOff.steps_left == 0:
                raise Interrupted("behind a step")


def cut_off(arguments: list[str], steps: int) -> None:
    """A run that is given `CutOff`, ended behind so many training steps."""
    CutOff.steps_left = steps
    try:
        with pytest.raises(Interrupted):
            main(arguments)
    finally:
        CutOff.steps_left = None


class Watch(WalkCallback):
    """Keeps the streams around every block, what was learned in it, and what it became."""

    streams: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []  # (x_fp, x_q) before each block and after all
    results: ClassVar[list[BlockResult]] = []
    learned: ClassVar[list[dict[str, torch.Tensor]]] = []  # Θ at its start, for each training
    rates: ClassVar[list[dict[str, float]]] = []  # learning rate of each tensor at the start of each training
    dtypes: ClassVar[list[torch.dtype]] = []

    @classmethod
    def fresh(cls) -> type["Watch"]:
        for seen in (cls.streams, cls.results, cls.learned, cls.rates, cls.dtypes):
            seen.clear()
        return cls

    def _keep_streams(self, walk: BlockWalk) -> None:
        self.streams.append((walk.inputs.fp.clone(), walk.inputs.q.clone()))

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        self.dtypes.append(walk.model.dtype)
        self._keep_streams(walk)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        theta = {name: value for name, value in pl_module.layer.named_parameters() if value.requires_grad}
        self.learned.append({name: value.detach().clone() for name, value in theta.items()})
        rate_of = {id(value): group["lr"] for group in trainer.optimizers[0].param_groups for value in group["params"]}
        self.rates.append({name: rate_of[id(value)] for name, value in theta.items()})

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        self.results.append(result)

    def on_walk_end(self, walk: BlockWalk) -> None:
        self._keep_streams(walk)


class Poison(WalkCallback):
    """Makes the loss NaN in as many trainings as `doses` says, from their second step on."""

    doses: ClassVar[int] = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: object) -> None:
        if trainer.global_step == 1 and Poison.doses > 0:
            Poison.doses -= 1
            with torch.no_grad():
                next(value for value in pl_module.layer.parameters() if value.requires_grad).fill_(torch.nan)


class Foreign(Callback):
    """A callback that knows nothing of the walk and counts its batches for each block by itself."""

    counts: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *event: object) -> None:
        self.batches += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.append(self.batches)
