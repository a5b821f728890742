"""Clip values by grid search: the baselines' weight clips and the start of the learned ones (paper §5.1).

Shape suffixes: O output rows, I input features, G groups of g, C candidates.
"""

import torch
from torch import Tensor

from bisup_lightning.quant.affine import operators, scale_and_offset, storable, to_groups, wide
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
    clips_C = torch.tensor(CLIP_GRID, dtype=wide(w_OI[:0]).dtype).to(w_OI.device, non_blocking=True)
    if operators is not None and operators.take(w_OI) and spec.symmetric:
        size = w_OI.shape[1] // spec.groups(w_OI.shape[1])
        error_COG = operators.clip_errors(w_OI, clips_C, spec.bits, size, scale_dtype)
    else:
        error_COG = _errors(wide(to_groups(w_OI, spec)), clips_C, spec, scale_dtype)
    if shared:
        error_COG = error_COG.sum(shared, keepdim=True)
    return clips_C[error_COG.argmin(0)].float()  # the mildest of those that are equally good


def _errors(w_OGg: Tensor, clips_C: Tensor, spec: QuantSpec, scale_dtype: torch.dtype | None) -> Tensor:
    """Squared error [C, O, G] of rounding each group with each of the clip values."""
    scale_OG1, offset = scale_and_offset(w_OGg, spec)
    shifted = w_OGg if offset is None else w_OGg - offset
    scales_COG1 = storable(scale_OG1 * clips_C.view(-1, 1, 1, 1), scale_dtype)
    return torch.stack(
        [
            ((shifted / scale).round().clamp(spec.qmin, spec.qmax) * scale - shifted).square().sum(-1)
            for scale in scales_COG1
        ]
    )
