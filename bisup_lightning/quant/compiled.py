"""Functions that run as they are written on a CPU, and compiled on a GPU."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compiled_on_gpu(*, dynamic: bool) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a function through torch.compile where its first tensor lies on a GPU.

    TORCH_COMPILE_DISABLE=1 runs everything as it is written.

    Args:
        dynamic: Whether one graph serves tensors of all shapes; otherwise each shape has its own, faster one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @cache  # made at the first use: torch.compile with options imports the compiler, which takes seconds
        def compiled() -> Callable[P, R]:
            # By default, fused kernels keep in float32 what eager code rounds to bf16. Quantization can turn so small a
            # difference into another code; gradients would then belong to other codes than an eager forward pass has.
            return torch.compile(function, dynamic=dynamic, options={"emulate_precision_casts": True})

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            on_gpu = next(value.is_cuda for value in args if isinstance(value, Tensor))
            return (compiled() if on_gpu else function)(*args, **kwargs)

        return run

    return decorate
