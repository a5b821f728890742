"""Clip values by grid search: the baselines' weight clips and the start of the learned ones (paper §5.1).

Shape suffixes: O output rows, I input features, G groups of g, C candidates.
"""

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
    shared = {"row": (), "group": (1,), "tensor": (1, 2)}[spec.granularity]
    clips_C = torch.tensor(CLIP_GRID, dtype=scale.dtype).to(w_OI.device, non_blocking=True)
    scales_COG1 = storable(scale * clips_C.view(-1, 1, 1, 1), scale_dtype)
    error_COG = torch.stack([rounding_error(shifted, scale_OG1, spec.qmin, spec.qmax) for scale_OG1 in scales_COG1])
    if shared:
        error_COG = error_COG.sum(shared, keepdim=True)
    return clips_C[error_COG.argmin(0)].float()  # the mildest of those that are equally good


@compiled_on_gpu(dynamic=True)
def rounding_error(w_OGg: Tensor, scale_OG1: Tensor, qmin: int, qmax: int) -> Tensor:
    """Squared error [O, G] of rounding each group to its grid."""
    rounded = (w_OGg / scale_OG1).round().clamp(qmin, qmax) * scale_OG1
    return (rounded - w_OGg).square().sum(-1)
