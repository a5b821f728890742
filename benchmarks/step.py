"""One calibration step of a block: time, share of the GPU's measured matmul rate, and memory.

    python -m benchmarks.step --rows eager compiled --precision w4a4-g128 --transform none

Rows: `dense`, the same block in plain bf16 with gradients of all its weights, compiled; `eager`, this project's step as
PyTorch runs it; `values`, compiled, with all products in bf16; and `compiled`, where forward products are those of
integer codes if the device has them. A step is forward, backward and AdamW on 8 × 2048 tokens.

Steps and the matmul rate are both measured on a GPU that has been busy for two seconds: at its power limit it slows
down to what it can keep up for the minutes that a calibration takes.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.synthetic import EPOCH_PASSES, SHAPES, Shape, write_checkpoint
from bisup_lightning.calibrate.block_calibration import block_loss
from bisup_lightning.model.block import learn_by_codes, quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, run_layer
from bisup_lightning.model.family import linear_inputs
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.theta import Theta, add_theta, theta_parameters
from bisup_lightning.quant.spec import Precision, QuantSpec, Scheme

GPU = torch.device("cuda")
WARM_UP, BUSY = 3, 2.0  # steps, and seconds
PRECISIONS = {"w4a4": (4, None), "w4a4-g128": (4, 128), "w3a3-g128": (3, 128)}


def median_ms(step, repeats: int = 12, busy: float = 0.0) -> float:
    """Median milliseconds of a step, by device events, with the host running ahead as it does in training.

    Args:
        step: What is measured.
        repeats: How often.
        busy: Seconds that the GPU has done the same before.
    """
    for _ in range(WARM_UP):
        step()
    began = time.perf_counter()
    while time.perf_counter() - began < busy:
        step()
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks))[repeats // 2]


def matmul_rate(busy: float = 0.0, size: int = 8192) -> float:
    """Operations a second of a large bf16 product on random data, on a GPU that has been busy for so many seconds."""
    a, b = torch.randn(2, size, size, device=GPU, dtype=torch.bfloat16)
    return 2 * size**3 / median_ms(lambda: a @ b, repeats=300 if busy else 12, busy=busy) * 1e3


def print_rate() -> float:
    """Print the GPU and its matmul rate, at first and once it has been busy; give the latter."""
    first, rate = matmul_rate(), matmul_rate(busy=BUSY)
    name = f"{torch.__version__} {torch.cuda.get_device_name()}"
    print(f"{name} {rate / 1e12:.0f} TFLOP/s measured ({first / 1e12:.0f} at first)", flush=True)
    return rate


def forward_operations(shape: Shape, batch: int, length: int) -> float:
    """Operations of one forward pass of a block: the products of its linears and of causal attention."""
    hidden = shape.hidden
    weights = 2 * hidden**2 + 2 * hidden * (hidden // shape.heads * shape.kv_heads) + 3 * hidden * shape.mlp
    return 2 * weights * batch * length + 2 * length**2 * hidden * batch


def measure(name: str, parameters, loss, operations: float, rate: float) -> None:
    """Print one row."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_ms(step, busy=BUSY)
    reached, peak = operations / milliseconds * 1e3, torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{name:28} {milliseconds:8.2f} ms {reached / 1e12:7.0f} TFLOP/s {reached / rate:6.3f} {peak:6.1f} GiB",
        flush=True,
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=1, help="tokens in front")
    parser.add_argument("--rows", nargs="+", default=["dense", "eager", "values", "compiled"])
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--transform", nargs="+", default=["none", "hadamard", "outliers"])
    parser.add_argument("--profile", action="store_true", help="a table of kernels behind compiled rows")
    given = parser.parse_args()
    rate = print_rate()
    operations = EPOCH_PASSES * forward_operations(SHAPES[given.shape], given.batch, given.length)
    folder = write_checkpoint(Path(tempfile.mkdtemp()), given.shape, num_blocks=1, device="cuda")
    model = BlockwiseModel(folder, GPU, torch.bfloat16, fused_attention=True)
    x_BTD, target_BTD = torch.randn(
        2, given.batch, given.length, model.family.hidden_size, device=GPU, dtype=torch.bfloat16
    )
    positions = model.positions(0, given.length, given.prompt)
    prompt = model.encode_prompt(0, model.layer(0), model.embed(torch.arange(given.prompt)[None]))[1]
    if "dense" in given.rows:
        layer = model.layer(0).requires_grad_(True)
        kv = BlockKV(None, prompt)
        dense = torch.compile(lambda: F.mse_loss(run_layer(layer, x_BTD, positions, kv).float(), target_BTD.float()))
        measure("dense, compiled", list(layer.parameters()), dense, operations, rate)
    for precision in given.precision:
        bits, group = PRECISIONS[precision]
        quantizer = QuantSpec(bits, group_size=group)
        kv_quantizer = QuantSpec(bits, symmetric=False, granularity="head")
        for transform in given.transform:
            extra = {"none": {}, "hadamard": {"hadamard": True}, "outliers": {"outliers": 128}}[transform]
            scheme = Scheme.of(Precision(quantizer, quantizer, kv_quantizer), **extra)
            layer = model.layer(0)
            orders = {
                entry.name: torch.randperm(linears[0].in_features, device=GPU)
                for entry, linears in linear_inputs(layer)
            }
            layer = quantize_layer(
                layer, scheme, model.family.config, 0.9, torch.bfloat16, orders if scheme.outliers else None
            )
            add_theta(layer, Theta(smoothing_start="ones"), torch.Generator().manual_seed(0))
            kv, theta = BlockKV(KVQuantizer.of(scheme), prompt), list(theta_parameters(layer).values())
            for row in given.rows:
                if row == "dense":
                    continue
                function = block_loss.__wrapped__ if row == "eager" else block_loss
                learn_by_codes(layer, on=row != "values")
                loss = lambda f=function: f(layer, x_BTD, target_BTD, positions, kv)  # noqa: E731, B023
                measure(f"{row}, {precision}, {transform}", theta, loss, operations, rate)
                if given.profile and row != "eager":
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                        for _ in range(3):
                            loss().backward()
                    print(
                        profile.key_averages().table(
                            sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90
                        )
                    )


if __name__ == "__main__":
    main()
