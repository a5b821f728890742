"""Products of 4-bit codes on tensor cores: float8 with scales for rows or groups of 128, and int8, beside bf16.

    python -m benchmarks.integer_products

Prints time, share of the matmul rate measured in the same run, and the error against float64.
"""

import torch
import torch.nn.functional as F

from benchmarks.step import GPU, matmul_rate, median_ms

TOKENS, GROUP = 16384, 128
WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # rows and features, of an 8B model


def measure(rows: int, features: int, rate: float) -> None:
    """Print the lines of one weight's shape."""
    codes_x, codes_w = ((torch.randn(n, features, device=GPU) * 2.5).round().clamp(-8, 7) for n in (TOKENS, rows))
    scale_x, scale_w = (torch.rand(n, features // GROUP, device=GPU) + 0.5 for n in (TOKENS, rows))
    x, w = (
        (codes.unflatten(-1, (-1, GROUP)) * scale.unsqueeze(-1)).flatten(-2)
        for codes, scale in ((codes_x, scale_x), (codes_w, scale_w))
    )
    few = slice(0, 256)
    by_group = x[few].double() @ w.double().T
    by_row = (codes_x[few].double() * scale_x[few, :1]) @ (codes_w.double() * scale_w[:, :1]).T
    x16, w16 = x.bfloat16(), w.bfloat16()
    x8, w8 = codes_x.to(torch.float8_e4m3fn), codes_w.to(torch.float8_e4m3fn)
    xi, wi = codes_x.to(torch.int8), codes_w.to(torch.int8)
    columns = [scale.T.contiguous().T for scale in (scale_x, scale_w)]
    first = [scale[:, :1].contiguous() for scale in (scale_x, scale_w)]

    def scaled(scales: list[torch.Tensor], dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
        return torch._scaled_mm(x8, w8.T, scales[0], scales[1].T, out_dtype=dtype, use_fast_accum=fast)

    ways = {
        "bf16": (lambda: F.linear(x16, w16), by_group),
        "float8, a scale for each row": (lambda: scaled(first, torch.bfloat16, fast=True), by_row),
        "float8, scales for each 128": (lambda: scaled(columns, torch.bfloat16), by_group),
        "float8, scales for each 128, float32": (lambda: scaled(columns, torch.float32), by_group),
        "int8 to int32": (lambda: torch._int_mm(xi, wi.T), codes_x[few].double() @ codes_w.double().T),
    }
    for name, (product, exact) in ways.items():
        milliseconds = median_ms(product)
        share = 2 * TOKENS * rows * features / milliseconds * 1e3 / rate
        error = (product()[few].double() - exact).norm() / exact.norm()
        print(f"{rows:6} x {features:5}  {name:38} {milliseconds:7.3f} ms {share:6.3f}  error {error:.1e}", flush=True)


def main() -> None:
    """Measure all shapes."""
    rate = matmul_rate()
    print(torch.__version__, torch.cuda.get_device_name(), f"{rate / 1e12:.0f} TFLOP/s measured")
    for rows, features in WEIGHTS:
        measure(rows, features, rate)


if __name__ == "__main__":
    main()
