"""Causal attention behind a prompt on a fused kernel, without a mask in memory.

Shape suffixes: B sequences, H heads, T tokens, P prompt tokens, d head dimension.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

FUSED_CAUSAL = "bisup_fused_causal"


def fused_causal_attention(
    module: nn.Module,
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, T, H, d], in transformers' interface for attention functions.

    Keys and values may have P more tokens in front than there are queries. The kernels' own causal mask is aligned at
    the upper left; P empty queries in front make that the lower right.

    Args:
        module: The attention module.
        q_BHTd: Queries.
        k_BHTd: Keys [B, H or fewer, P + T, d].
        v_BHTd: Values likewise.
        attention_mask: Boolean [.., T, P + T] where a causal mask won't do (a sliding window), else None.
        scaling: Factor of the scores.
        kwargs: What else the interface passes.
    """
    prompt_length = k_BHTd.shape[2] - q_BHTd.shape[2] if attention_mask is None else 0
    if prompt_length:
        q_BHTd = F.pad(q_BHTd, (0, 0, prompt_length, 0))
    output_BHTd = F.scaled_dot_product_attention(
        q_BHTd, k_BHTd, v_BHTd, attention_mask, is_causal=attention_mask is None, scale=scaling, enable_gqa=True
    )
    return output_BHTd[:, :, prompt_length:].transpose(1, 2), None


AttentionInterface.register(FUSED_CAUSAL, fused_causal_attention)
