"""The whole model is never in memory: measured on a process that calibrates one whose blocks are its bulk."""

import subprocess
import sys

import pytest

from tests.inputs import ROOT
from tests.tools import RTN

LAYERS, WIDE = 12, {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
MAIN = """
import os, re, sys
sys.path.insert(0, os.getcwd())  # as `python main.py` has it
from bisup_lightning.cli import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print("peak", int(peak[1]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def peak_bytes(arguments):
    """High-water mark of a fresh process; getrusage would count what its parent held."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_a_block_and_not_with_the_model(make_checkpoint, fit_arguments, tmp_path):
    """Twelve blocks need what one needs: the growth stays far below the eleven others, shards and artifact alike."""
    peaks, bytes_of_blocks = {}, 0
    for layers in (1, LAYERS):
        folder = make_checkpoint(num_hidden_layers=layers, max_shard_size="20MB", vocab_size=8192, **WIDE)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        bytes_of_blocks = size - bytes_of_blocks
        runs = (tmp_path / f"{layers}-{turn}" for turn in range(3))  # as the allocator's arenas differ by chance
        peaks[layers] = min(peak_bytes(fit_arguments(folder, run, RTN, "--data.num_samples=4")) for run in runs)
    assert bytes_of_blocks > 140e6  # eleven blocks; both streams together have half a megabyte
    growth = peaks[LAYERS] - peaks[1]
    assert growth < bytes_of_blocks / 2, f"{growth / 1e6:.0f} MB more for {bytes_of_blocks / 1e6:.0f} MB of blocks"
