"""Peak device memory and time of one block's calibration in each memory mode, by `fit --dry_run` on random checkpoints.

    python -m benchmarks.memory --shape 8b 32b 70b --config configs/precision/w4a4-g128.yaml

The peak holds the block, the one read ahead, training with AdamW and all forward passes; streams are on the host, and
would add three times the size given where they are on the device. Other options are those of `fit`.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.synthetic import SHAPES, write_checkpoint
from bisup_lightning.calibrate.dry_run import Forecast, dry_run
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.cli import quieten
from bisup_lightning.job_config import make_job
from bisup_lightning.parsers import fit_parser

ROOT = Path(__file__).parent.parent
MODES = ("auto", "low")


def measure(checkpoint: Path, mode: str, options: list[str]) -> Forecast:
    """What a run in one mode would take."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    parser = fit_parser()
    arguments = [
        f"--config={ROOT / 'configs/base.yaml'}", f"--checkpoint={checkpoint}", f"--run_dir={checkpoint}-run",
        "--data.calibration=self", "--evaluation.perplexity=[]", "--streams=host", f"--memory={mode}", *options,
    ]  # fmt: skip
    return dry_run(make_job(parser, parser.parse_args(arguments), Signals()))


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["8b", "32b", "70b"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    given, options = parser.parse_known_args(arguments)
    quieten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.__version__, torch.cuda.get_device_name() if device == "cuda" else "CPU")
    print(f"{'shape':6} {'memory':6} {'device GiB':>10} {'a stream GiB':>12} {'s a block':>10}")
    for shape in given.shape:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_checkpoint(Path(folder, shape), shape, num_blocks=2, device=device)
            for mode in given.mode:
                found = measure(checkpoint, mode, options)
                peak = f"{found.device / 2**30:.2f}" if device == "cuda" else "–"
                stream, seconds = found.budget.stream / 2**30, sum(found.phases.values())
                print(f"{shape:6} {mode:6} {peak:>10} {stream:12.2f} {seconds:10.2f}", flush=True)


if __name__ == "__main__":
    main()
