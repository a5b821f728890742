"""Time of GPTQ on single weights of Llama-3-8B's shapes, on a CUDA device.

    python -m benchmarks.gptq_layer

The second of two runs counts; the first one warms up.
"""

import time

import torch

from benchmarks.synthetic import SHAPES
from bisup_lightning.quant.gptq import ClippedSegment, accumulate_hessian, gptq_quantize
from bisup_lightning.quant.spec import QuantSpec

TOKENS = 32768


def main() -> None:
    """Print seconds for each shape, per row and in groups of 128."""
    print(torch.__version__, torch.cuda.get_device_name())
    torch.manual_seed(0)
    hidden, mlp = SHAPES["8b"].hidden, SHAPES["8b"].mlp
    for rows, features in ((mlp, hidden), (hidden, mlp)):
        x_TI = torch.randn(TOKENS, features, device="cuda") * torch.randn(features, device="cuda").exp()
        hessian_II = accumulate_hessian(torch.zeros(features, features, device="cuda"), x_TI)
        weight_OI = torch.randn(rows, features, device="cuda") * 0.02
        for spec in (QuantSpec(4), QuantSpec(4, group_size=128)):
            for _ in range(2):
                torch.cuda.synchronize()
                started = time.perf_counter()
                gptq_quantize(weight_OI, hessian_II, [ClippedSegment(features, spec)], scale_dtype=torch.bfloat16)
                torch.cuda.synchronize()
            print(f"{rows} × {features}, group {spec.group_size}: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
