"""Clip values by grid search: the baselines' weight clips and the start of the learned ones (paper §5.1).

Shape suffixes: O output rows, I input features, G groups of g elements each, K candidates of a clip value.
"""

import torch
from torch import Tensor

from bisup_lightning.quant import operators
from bisup_lightning.quant.affine import scale_and_offset, storable, to_groups, wide
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
    shared = {"row": (), "group": (1,), "tensor": (1, 2)}[spec.granularity]
    clips_K = torch.tensor(CLIP_GRID, dtype=wide(w_OI[:0]).dtype).to(w_OI.device, non_blocking=True)
    if operators.supports(w_OI) and spec.symmetric:
        size = w_OI.shape[1] // spec.groups(w_OI.shape[1])
        error_KOG = operators.clip_errors(w_OI, clips_K, spec.bits, size, scale_dtype)
    else:
        error_KOG = _errors(wide(to_groups(w_OI, spec)), clips_K, spec, scale_dtype)
    if shared:
        error_KOG = error_KOG.sum(shared, keepdim=True)
    return clips_K[error_KOG.argmin(0)].float()  # the mildest of those that are equally good


def _errors(w_OGg: Tensor, clips_K: Tensor, spec: QuantSpec, scale_dtype: torch.dtype | None) -> Tensor:
    """Squared error [K, O, G] of rounding each group with each of the clip values."""
    scale_OG1, offset = scale_and_offset(w_OGg, spec)
    shifted = w_OGg if offset is None else w_OGg - offset
    scales_KOG1 = storable(scale_OG1 * clips_K.view(-1, 1, 1, 1), scale_dtype)
    return torch.stack(
        [
            ((shifted / scale).round().clamp(spec.qmin, spec.qmax) * scale - shifted).square().sum(-1)
            for scale in scales_KOG1
        ]
    )
