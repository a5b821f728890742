"""The quantizers' Triton kernels: time against that of moving the same bytes, on the tensors of an 8B model's MLP.

    python -m benchmarks.quantizers [--variants]

The floor is what a copy of as many bytes takes, measured in the same run. `--variants` also tries other tiles.
"""

import argparse
import itertools

import torch

from benchmarks.step import GPU, median_ms
from bisup_lightning.quant import operators
from bisup_lightning.quant.clipping import CLIP_GRID

TOKENS = 16384
WEIGHTS = ((14336, 4096), (4096, 14336))  # rows and features: the gate or up projection, and the down projection


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3


def report(name: str, step, moved: int, rate: float) -> None:
    """Print one row."""
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    milliseconds = median_ms(graph.replay)
    print(
        f"{name:56} {milliseconds:7.3f} ms, {moved / rate / milliseconds * 1e3:5.2f} of the floor's speed", flush=True
    )


def weight(rows: int, features: int, size: int, rate: float, note: str = "") -> None:
    """Rounding a weight with all of Θ, its gradients, and the search for its first clip values."""
    w = torch.randn(rows, features, device=GPU, dtype=torch.bfloat16) * 0.02
    a, b = torch.randn(rows, 32, device=GPU), torch.randn(32, features, device=GPU) * 0.01
    s, clip = torch.rand(features, device=GPU) + 0.5, torch.full((rows, features // size), 0.9, device=GPU)
    grad = torch.randn_like(w)
    name = f"{rows} x {features}, groups of {size}{note}"
    options = (w, a, b, s, clip, 4, size, "slrec", torch.bfloat16)
    for codes in (None, torch.float8_e4m3fn):
        step = lambda c=codes: operators.round_weight(*options, torch.bfloat16, c)  # noqa: E731
        report(f"round {name}{', with codes' if codes else ''}", step, (5 if codes else 4) * w.numel(), rate)
    absmax, signed_argmax = step()[1:3]
    backward = lambda: operators.round_weight_gradient(grad, absmax, signed_argmax, *options)  # noqa: E731
    report(f"gradients {name}", backward, 4 * w.numel(), rate)
    clips = torch.tensor(CLIP_GRID, device=GPU)
    search = lambda: operators.clip_errors(w, clips, 4, size, torch.bfloat16)  # noqa: E731
    report(f"search clips {name}", search, 2 * w.numel(), rate)


def activation(features: int, size: int, rate: float, note: str = "") -> None:
    """Rounding an activation, or the product of a gate, and its gradients."""
    x, factor, grad = torch.randn(3, TOKENS, features, device=GPU, dtype=torch.bfloat16)
    clip = torch.full((features // size,), 0.9, device=GPU)
    for up in (None, factor):
        name = f"{TOKENS} tokens x {features}, groups of {size}{'' if up is None else ', gated'}{note}"
        more = 0 if up is None else 2
        for coded in (False, True):
            step = lambda u=up, c=coded: operators.round_rows(x, u, clip, 4, size, c)  # noqa: E731
            report(f"round {name}{', with codes' * coded}", step, (4 + more + coded) * x.numel(), rate)
        backward = lambda u=up: operators.round_rows_gradient(grad, x, u, clip, 4, size)  # noqa: E731
        report(f"gradients {name}", backward, (6 + 2 * more) * x.numel(), rate)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", action="store_true", help="other tiles than the ones in use, too")
    given = parser.parse_args()
    rate = copy_rate()
    print(torch.__version__, torch.cuda.get_device_name(), f"a copy moves {rate / 1e12:.2f} TB/s")
    for rows, features in WEIGHTS:
        for size in (128, features):
            weight(rows, features, size, rate)
            activation(features, size, rate)
    if not given.variants:
        return
    for (block_o, warps), part in itertools.product(((32, 4), (64, 4), (64, 8), (128, 8)), (256, 512, 1024)):
        operators.ROUND_BLOCKS, operators.PART = {"block_o": block_o, "num_warps": warps}, part
        for size in (128, 4096):
            weight(14336, 4096, size, rate, f", {block_o} rows, {warps} warps, parts of {part}")
    tiles = (16, 4, 168), (16, 4, None), (64, 4, 168), (64, 4, None), (128, 8, None)
    for (block_o, warps, registers), stages, parts in itertools.product(tiles, (1, 2, 3), (4, 8, 12, 16)):
        blocks = {"block_o": block_o, "num_warps": warps, "num_stages": stages}
        operators.GRADIENT_BLOCKS = (blocks | ({"maxnreg": registers} if registers else {}),)
        operators.ROW_PARTS = parts
        note = f", {block_o} rows, {warps} warps, {stages} stages, {registers or 'any'} registers, {parts} parts"
        weight(14336, 4096, 128, rate, note)
    for tile in (2048, 4096, 8192):
        operators.ROW_TILE = tile
        for features, size in ((4096, 128), (4096, 4096), (14336, 14336)):
            activation(features, size, rate, f", tile {tile}")


if __name__ == "__main__":
    main()
