"""Where quantization errors arise and how they spread: down the blocks and along the text (paper §5.4, Figures 2, 3).

Shape suffixes: N sequences, T tokens, D hidden size, P prompt tokens, L blocks, H heads, S blocks that are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bisup_lightning.model.blockwise import BlockwiseModel, ExactPrompt, Positions, run_layer
from bisup_lightning.model.family import watch_attention


@dataclass(frozen=True)
class HiddenErrors:
    """How far a quantized model's hidden states are from the full-precision model's.

    Args:
        error_LT: Mean over sequences and channels of the squared difference behind each block, at each token; float64.
        scale_LT: The same mean of the full-precision hidden states themselves, squared.
    """

    error_LT: Tensor
    scale_LT: Tensor

    def mse(self) -> Tensor:
        """Mean square error behind each block, [L] (Figure 3 shows the last)."""
        return self.error_LT.mean(1)

    def relative_mse(self) -> Tensor:
        """Mean square error over the mean square of the full-precision hidden states, [L]."""
        return self.error_LT.sum(1) / self.scale_LT.sum(1)

    def by_position(self) -> Tensor:
        """Relative error behind the last block at each token of the text, [T]."""
        return self.error_LT[-1] / self.scale_LT[-1]


@torch.no_grad()
def hidden_errors(
    fp: BlockwiseModel,
    quantized: BlockwiseModel,
    ids_NT: Tensor,
    prompt_ids: Sequence[int],
    batch_size: int,
    prompt_exact: bool = True,
) -> HiddenErrors:
    """Run both models side by side, block by block, and compare their hidden states.

    Args:
        fp: The full-precision model after its transform: both must share a basis.
        quantized: The quantized model.
        ids_NT: Token ids.
        prompt_ids: Token ids of the prompt before each sequence; its own tokens are not compared.
        batch_size: Sequences in a forward pass.
        prompt_exact: Whether the quantized model has the prompt's keys and values at high precision (§4.5), or
            quantizes the prompt like any text.
    """
    skipped = 0
    if not prompt_exact:
        ids_NT = torch.cat([torch.tensor([list(prompt_ids)]).long().expand(len(ids_NT), -1), ids_NT], 1)
        skipped, prompt_ids = len(prompt_ids), ()
    x_NTD, y_NTD = fp.embed(ids_NT), quantized.embed(ids_NT)
    fp_prompt, own_prompt = ExactPrompt(fp, prompt_ids), ExactPrompt(quantized, prompt_ids)
    error_LT = torch.zeros(fp.num_layers, ids_NT.shape[1], dtype=torch.float64, device=fp.device)
    scale_LT = torch.zeros_like(error_LT)
    for (index, fp_layer), (_, layer) in zip(fp.layers(), quantized.layers(), strict=True):
        fp_kv, kv = fp_prompt.block_kv(index, fp_layer), own_prompt.block_kv(index, layer)
        positions = fp.positions(index, ids_NT.shape[1], len(prompt_ids))
        own_positions = quantized.positions(index, ids_NT.shape[1], len(prompt_ids))
        for start in range(0, len(ids_NT), batch_size):
            batch = slice(start, start + batch_size)
            x_BTD = run_layer(fp_layer, x_NTD[batch].to(fp.device), positions, fp_kv)
            y_BTD = run_layer(layer, y_NTD[batch].to(fp.device), own_positions, kv)
            x_NTD[batch], y_NTD[batch] = x_BTD, y_BTD
            error_LT[index] += (y_BTD.double() - x_BTD.double()).square().mean(-1).sum(0)
            scale_LT[index] += x_BTD.double().square().mean(-1).sum(0)
    error_LT, scale_LT = (figure_LT[:, skipped:].cpu() / len(ids_NT) for figure_LT in (error_LT, scale_LT))
    return HiddenErrors(error_LT, scale_LT)


@torch.no_grad()
def attention_maps(
    model: BlockwiseModel, ids_NT: Tensor, prompt_ids: Sequence[int], blocks: Sequence[int]
) -> list[Tensor]:
    """Attention weights [T, P + T] of some blocks, mean over heads and sequences, float32 (Figure 2).

    Args:
        model: Full-precision, or quantized behind its stored prompt.
        ids_NT: Token ids; a few short sequences.
        prompt_ids: Token ids of the prompt in front, the first P keys.
        blocks: Which blocks, in rising order.
    """
    maps: list[Tensor] = []
    exact = ExactPrompt(model, prompt_ids)
    hidden_NTD = model.embed(ids_NT).to(model.device)
    for index, layer in model.layers():
        if index > blocks[-1]:
            break
        kv = exact.block_kv(index, layer)
        positions = model.positions(index, ids_NT.shape[1], exact.length)
        if index in blocks:
            watch_attention(layer, lambda weights_NHTK: maps.append(weights_NHTK.float().mean((0, 1)).cpu()))
            positions = _additive(positions, ids_NT.shape[1], model.dtype)
        hidden_NTD = run_layer(layer, hidden_NTD, positions, kv)
    return maps


def _additive(positions: Positions, length: int, dtype: torch.dtype) -> Positions:
    """The same positions with an additive mask: 0 where a token may look, −inf elsewhere."""
    device = positions.rotary[0].device
    mask = positions.mask
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    additive = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, float("-inf"))
    return Positions(positions.rotary, additive)
