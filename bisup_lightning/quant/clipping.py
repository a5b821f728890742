"""Clip values by grid search: the baselines' weight clips and the start of the learned ones (paper §5.1)."""

import torch
from torch import Tensor

from bisup_lightning.quant.affine import scale_and_offset, storable, to_groups, wide
from bisup_lightning.quant.compiled import compiled_on_gpu
from bisup_lightning.quant.spec import QuantSpec

CLIP_GRID = tuple(1.0 - 0.02 * step for step in range(36))  # 1.00, 0.98, …, 0.30


@torch.no_grad()
def search_weight_clip(w_OI: Tensor, spec: QuantSpec, scale_dtype: torch.dtype | None = None) -> Tensor:
    """Clip values of least squared rounding error, chosen from `CLIP_GRID` for each row, group or tensor.

    Args:
        w_OI: Weight [O, I].
        spec: Its quantizer; `spec.granularity` says what shares a clip value.
        scale_dtype: Storage dtype of the scales.

    Returns:
        Clip values [O, G], [1, G] or [1, 1] by granularity, float32.
    """
    w_OGg = wide(to_groups(w_OI, spec))
    scale, offset = scale_and_offset(w_OGg, spec)
    shifted = w_OGg if offset is None else w_OGg - offset
    shared = {"row": (), "group": (0,), "tensor": (0, 1)}[spec.granularity]
    best_clip = torch.ones(spec.clip_shape(*w_OI.shape), dtype=scale.dtype, device=w_OI.device)
    best_error = torch.full_like(best_clip, torch.inf)
    for clip in CLIP_GRID:
        error_OG = rounding_error(shifted, storable(scale * clip, scale_dtype), spec.qmin, spec.qmax)
        if shared:
            error_OG = error_OG.sum(shared, keepdim=True)
        better = error_OG < best_error
        best_error = torch.where(better, error_OG, best_error)
        best_clip = torch.where(better, clip, best_clip)
    return best_clip.float()


@compiled_on_gpu(dynamic=True)
def rounding_error(w_OGg: Tensor, scale_OG1: Tensor, qmin: int, qmax: int) -> Tensor:
    """Squared error [O, G] of rounding each group to its grid."""
    rounded = (w_OGg / scale_OG1).round().clamp(qmin, qmax) * scale_OG1
    return (rounded - w_OGg).square().sum(-1)
