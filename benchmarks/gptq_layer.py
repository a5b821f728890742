"""Time of GPTQ on one layer of Llama-3-8B's shapes, on a CUDA device."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bisup_lightning.quant.gptq import ClippedSegment, accumulate_hessian, gptq_quantize
from bisup_lightning.quant.spec import QuantSpec


def main() -> None:
    """Print seconds for each shape, per row and in groups of 128."""
    print(torch.__version__, torch.cuda.get_device_name())
    torch.manual_seed(0)
    for features, rows in ((4096, 14336), (14336, 4096)):
        x_TI = torch.randn(32768, features, device="cuda") * torch.randn(features, device="cuda").exp()
        hessian_II = accumulate_hessian(torch.zeros(features, features, device="cuda"), x_TI)
        weight_OI = torch.randn(rows, features, device="cuda") * 0.02
        for spec in (QuantSpec(4), QuantSpec(4, group_size=128)):
            for _ in range(2):  # the first one warms up
                torch.cuda.synchronize()
                started = time.perf_counter()
                gptq_quantize(weight_OI, hessian_II, [ClippedSegment(features, spec)], scale_dtype=torch.bfloat16)
                torch.cuda.synchronize()
            print(f"{rows} × {features}, group {spec.group_size}: {time.perf_counter() - started:.2f} s")


main()
