"""Integer codes in exactly N bits each, as bit planes: a 3-bit weight costs 3 bits on disk."""

import torch
from torch import Tensor

from bisup_lightning.quant.compiled import compiled_on_gpu


def pack(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """Pack codes [..., I] into bytes [..., bits, ceil(I/8)].

    Plane j holds bit j of code − qmin for eight neighbours a byte, lowest neighbour in the lowest bit; a row whose
    length is no multiple of eight is filled with zero bits.

    Args:
        codes: Integers in [qmin, qmin + 2^bits).
        bits: Width of a code, 1 to 8.
        qmin: The smallest code, stored as 0.

    Raises:
        ValueError: If the codes are no integers, the width is out of range, or a code is; the latter is not looked for
            on a GPU, which the host would have to wait for.
    """
    if not 1 <= bits <= 8 or codes.is_floating_point():
        raise ValueError(f"codes must be integers of 1 to 8 bits, not {codes.dtype} of {bits} bits")
    if codes.numel() and not codes.is_cuda and not qmin <= codes.min().item() <= codes.max().item() < qmin + 2**bits:
        raise ValueError(f"a code lies outside [{qmin}, {qmin + 2**bits - 1}]")
    return _bit_planes(codes, bits, qmin)


@compiled_on_gpu(dynamic=True)
def _bit_planes(codes: Tensor, bits: int, qmin: int) -> Tensor:
    unsigned = codes.to(torch.int16) - qmin
    filled = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    place_8 = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [((filled >> bit & 1) * place_8).sum(-1, dtype=torch.uint8) for bit in range(bits)]
    return torch.stack(planes, dim=-2)


def unpack(packed: Tensor, features: int, qmin: int) -> Tensor:
    """Codes [..., features] (int8, or int16 where they are unsigned) from bytes [..., bits, ceil(features/8)]."""
    places_8 = torch.arange(8, dtype=torch.uint8, device=packed.device)
    unsigned = torch.zeros(*packed.shape[:-2], packed.shape[-1], 8, dtype=torch.uint8, device=packed.device)
    for bit, plane in enumerate(packed.unbind(-2)):
        unsigned |= (plane.unsqueeze(-1) >> places_8 & 1) << bit
    codes = unsigned.flatten(-2)[..., :features].to(torch.int16) + qmin
    return codes.to(torch.int8) if qmin < 0 else codes


fast_unpack = compiled_on_gpu(dynamic=True)(unpack)  # for a walk, which does it once a block
