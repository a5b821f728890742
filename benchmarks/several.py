"""How much faster several GPUs of this host are than one of them, by runs of `fit` on a random checkpoint.

    python -m benchmarks.several --gpus 4 --mode data wavefront --config configs/precision/w4a4-g128.yaml \
        --compile always --data.batch_size 16

First every GPU walks by itself, all at once; then all of them walk together, once for each mode. What a block takes is
measured by when finished blocks were saved, from the fifth on, when all is compiled; a run that has saved its last
block is ended. Other options are those of `fit`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.synthetic import SHAPES, write_checkpoint, write_text
from bisup_lightning.run_layout import METRICS, block_file

ROOT = Path(__file__).parent.parent
COMPILING = 4  # blocks in which something may still be compiled
PHASES = ("full precision", "start", "solve", "advance")


@dataclass(frozen=True)
class Pace:
    """How a run went, once it flowed.

    Args:
        seconds: From one finished block to the next.
        phases: Mean seconds of the parts of a block, on the process that saved it.
    """

    seconds: float
    phases: dict[str, float]


def metrics_of(run_dir: Path, index: int) -> Path:
    """The last file that is written of a finished block."""
    return run_dir / block_file(index, METRICS)


def pace(run_dir: Path, blocks: int, stages: int = 1) -> Pace:
    """The pace of a run that has finished so many blocks.

    Args:
        run_dir: Of the run.
        blocks: How many.
        stages: How many are calibrated at the same time: they may be saved in bursts, so that each is compared with the
            one that its own stage saved before.
    """
    files = [metrics_of(run_dir, index) for index in range(COMPILING, blocks)]
    saved = [file.stat().st_mtime for file in files]
    gaps = [(now - last) / stages for last, now in zip(saved, saved[stages:], strict=False)]
    phases = [json.loads(file.read_text(encoding="utf-8"))["phases"] for file in files]
    return Pace(fmean(gaps), {name: fmean(phase[name] for phase in phases) for name in PHASES})


class Walk:
    """A run of `fit` in processes of its own.

    Args:
        run_dir: Where to.
        blocks: To be finished.
        options: Of `fit`.
        environment: Beside this process's own.
    """

    def __init__(self, run_dir: Path, blocks: int, options: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self.run_dir, self.blocks, self.log = run_dir, blocks, run_dir.with_suffix(".log")
        command = [sys.executable, str(ROOT / "main.py"), "fit", *options, f"--run_dir={run_dir}"]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
            )

    def is_finished(self) -> bool:
        """Whether the last block is saved; then the run is ended.

        Raises:
            SystemExit: If it ended before, with the end of what it said.
        """
        ended = self.process.poll() is not None
        finished = metrics_of(self.run_dir, self.blocks - 1).is_file()
        if ended and not finished:
            sys.exit(f"{self.run_dir.name} ended early:\n{self.log.read_text(encoding='utf-8')[-2000:]}")
        if finished:
            self.stop()
        return finished

    def stop(self) -> None:
        """End all its processes, whatever they do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(walks: Sequence[Walk]) -> None:
    """Let walks finish side by side; if one fails, end them all."""
    try:
        while not all([walk.is_finished() for walk in walks]):  # all are asked each time
            time.sleep(0.2)
    finally:
        for walk in walks:
            walk.stop()


def report(name: str, found: Pace, alone: Sequence[Pace]) -> None:
    """Print one row, with the speed-up over the mean of what one GPU took, the fastest and the slowest."""
    speedup = ""
    if alone:
        by = [one.seconds / found.seconds for one in alone]
        speedup = f"{fmean(by):5.2f} times as fast as one ({min(by):.2f} to {max(by):.2f})"
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found.phases.items())
    print(f"{name:12} a block every {found.seconds:.3f} s {speedup:46} [{phases}]", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--gpus", type=int, default=max(2, torch.cuda.device_count()), help="processes, without a GPU")
    parser.add_argument("--mode", nargs="+", choices=("data", "wavefront"), default=["data", "wavefront"])
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--blocks_alone", type=int, default=9, help="of each run on one GPU")
    parser.add_argument("--config", action="append", default=[], help="composed behind configs/base.yaml")
    given, more = parser.parse_known_args(arguments)
    if not COMPILING + 1 < given.blocks_alone <= given.blocks or given.blocks <= COMPILING + given.gpus:
        parser.error(
            f"the first {COMPILING} blocks do not count: --blocks_alone must lie above {COMPILING + 1} and not above "
            f"--blocks, which must lie above {COMPILING + given.gpus}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.__version__, torch.cuda.get_device_name() if device == "cuda" else "CPU", " ".join(more))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "checkpoint", given.shape, given.blocks, device=device)
        torch.cuda.empty_cache()
        text = write_text(folder)
        options = [
            f"--config={ROOT / 'configs/base.yaml'}", *(f"--config={path}" for path in given.config),
            f"--checkpoint={checkpoint}", f"--data.calibration={text}", "--evaluation.perplexity=[]",
            f"--trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", *more,
        ]  # fmt: skip
        alone = []
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // given.gpus))}  # of the host, as `fit` does it
        run(
            [
                Walk(folder / f"alone-{gpu}", given.blocks_alone, options, {**share, "CUDA_VISIBLE_DEVICES": str(gpu)})
                for gpu in range(given.gpus)
            ]
        )
        for gpu in range(given.gpus):
            alone.append(pace(folder / f"alone-{gpu}", given.blocks_alone))
            report(f"one (GPU {gpu})", alone[-1], [])
        for mode in given.mode:
            together = [*options, f"--parallel.mode={mode}", f"--trainer.devices={given.gpus}"]
            run([Walk(folder / mode, given.blocks, together)])
            report(mode, pace(folder / mode, given.blocks, given.gpus if mode == "wavefront" else 1), alone)


if __name__ == "__main__":
    main()
