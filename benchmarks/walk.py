"""A whole `fit`, from disk to disk, on a random checkpoint of a known shape: where the time of a block goes.

    python -m benchmarks.walk --shape 8b --blocks 8 --config configs/precision/w4a4-g128.yaml

Prints a line for each block, the mean of those behind the first two (which compile), the floor of 17 forward passes
(`FLOOR_PASSES`) at the matmul rate that the GPU keeps up, measured in the same run, the share of time in which the GPU
idles and the longest such times, and what all blocks of the model would take.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.step import forward_operations, print_rate
from benchmarks.synthetic import FLOOR_PASSES, LENGTH, SEQUENCES, SHAPES, write_checkpoint, write_text
from bisup_lightning.calibrate.block_result import BlockResult
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.cli import main as run_command

ROOT = Path(__file__).parent.parent
COMPILING = 2  # blocks in which something is still compiled
LONGEST = 12  # of the times in which the GPU idled, to be listed
CALLBACKS = (
    "{{class_path: callbacks.bf16.BF16}}",
    "{{class_path: callbacks.fuse.Fuse}}",
    "{{class_path: callbacks.checkpoint.BlockCheckpoint, init_args: {{every_n_seconds: {save_every}}}}}",
    "{{class_path: callbacks.progress.WalkProgress}}",
    "{{class_path: benchmarks.walk.Timeline}}",
)


class Timeline(WalkCallback):
    """Wall-clock time at each block's end, and what the GPU did in one of them."""

    ends: ClassVar[list[float]] = []
    busy: ClassVar[float] = float("nan")
    gaps: ClassVar[list[tuple[float, float, str]]] = []  # seconds idle, since the first kernel, and the kernel behind
    profiled = COMPILING

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        """Begin to watch the GPU."""
        if index == self.profiled:
            torch.cuda.synchronize()
            self.began = time.perf_counter()
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
            self.profiler.start()

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        """Note the time; this callback stands behind the one that saves."""
        torch.cuda.synchronize()
        now = time.perf_counter()
        if result.index == self.profiled:
            wall = now - self.began
            self.profiler.stop()
            spans = sorted(
                (event.time_range.start, event.time_range.end, event.name)
                for event in self.profiler.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            )
            busy, first = 0.0, spans[0][0]
            reached = first
            for start, end, name in spans:  # kernels of two streams may overlap
                busy += max(0.0, end - max(start, reached))
                Timeline.gaps.append(((start - reached) * 1e-6, (reached - first) * 1e-6, name))
                reached = max(reached, end)
            Timeline.busy = busy * 1e-6 / wall
            now = time.perf_counter()  # reading the profile takes seconds, which are not the next block's
        Timeline.ends.append(now)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--config", action="append", default=[], help="composed behind configs/base.yaml")
    parser.add_argument("--save_every", type=float, default=60.0, help="seconds between saves inside a block")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.mkdtemp()))
    given, more = parser.parse_known_args()
    rate = print_rate()
    checkpoint = write_checkpoint(given.folder / "checkpoint", given.shape, given.blocks, device="cuda")
    text = write_text(given.folder)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    code = run_command([
        "--trust_classes_from", "benchmarks", "fit", f"--config={ROOT / 'configs/base.yaml'}",
        *(f"--config={path}" for path in given.config), f"--checkpoint={checkpoint}",
        f"--run_dir={given.folder / 'run'}", f"--data.calibration={text}", "--evaluation.perplexity=[]",
        f"--trainer.callbacks=[{', '.join(CALLBACKS).format(save_every=given.save_every)}]", *more,
    ])  # fmt: skip
    assert code == 0
    wall = time.perf_counter() - began
    from benchmarks.walk import Timeline as Watched  # the command line imported this file by its name

    metrics = json.loads((given.folder / "run" / "results.json").read_text(encoding="utf-8"))
    names = list(metrics["blocks"][0]["phases"])
    print("block   wall  " + "  ".join(f"{name:>14}" for name in names))
    walls = [end - start for start, end in zip(Watched.ends, Watched.ends[1:], strict=False)]
    for block, seconds in zip(metrics["blocks"][1:], walls, strict=True):
        print(f"{block['index']:5} {seconds:6.2f}  " + "  ".join(f"{block['phases'][name]:14.3f}" for name in names))
    steady = walls[COMPILING:]  # walls begin at block 1; the profiled block is left out, too
    shape = SHAPES[given.shape]
    mean = sum(steady) / len(steady)
    floor = FLOOR_PASSES * forward_operations(shape, SEQUENCES, LENGTH) / rate
    print(f"mean of {len(steady)} blocks {mean:.2f} s, floor {floor:.2f} s: {mean / floor:.3f} of the floor")
    print(f"GPU idle in block {COMPILING}: {1 - Watched.busy:.3f} (under the profiler, which slows the host)")
    for idle, at, name in sorted(Watched.gaps, reverse=True)[:LONGEST]:
        print(f"  {idle * 1e3:6.1f} ms at {at:.3f} s before {name[:70]}")
    print(f"whole command {wall:.1f} s; {shape.blocks} blocks at that pace: {mean * shape.blocks:.0f} s")
    device, host = (metrics[f"peak_{place}_bytes"] / 2**30 for place in ("device", "host"))
    print(f"peak memory: device {device:.1f} GiB, host {host:.1f} GiB")


if __name__ == "__main__":
    main()
