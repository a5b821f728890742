"""QuaRot (arXiv 2404.00456): rotations that spread outliers and leave the model's function as it is.

With row vectors and an orthogonal Q, the residual stream h becomes hQ. Shape suffixes: V vocabulary, D hidden size,
O output rows, I input features, H heads, d head dimension.
"""

import torch
from torch import Tensor

from bisup_lightning.model.checkpoint import Checkpoint
from bisup_lightning.model.family import (
    ATTENTION_OUTPUT,
    FINAL_NORM,
    HEAD,
    LINEAR_INPUTS,
    RESIDUAL_WRITERS,
    VALUE,
    Family,
)
from bisup_lightning.quant.hadamard import apply_hadamard, hadamard_factors, random_signs
from bisup_lightning.quant.spec import Precision, Scheme
from bisup_lightning.transform.transform import Transform


class QuaRot(Transform):
    """Folds the norms, rotates the residual stream, and the values within each head; the rest rotates at run time.

    At run time: Hadamard transforms of o_proj's input across heads, of down_proj's input, and of keys after RoPE.

    Args:
        seed: Seed of the residual rotation's signs.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scheme(self, precision: Precision) -> Scheme:
        """Inputs of o_proj and down_proj and the keys rotate at run time."""
        return Scheme.of(precision, hadamard=True)

    def checkpoint(self, checkpoint: Checkpoint, family: Family, device: torch.device) -> Checkpoint:
        """The rotated model."""
        return RotatedCheckpoint(checkpoint, family, device, self.seed)


class RotatedCheckpoint(Checkpoint):
    """Tensors of the rotated model: products in float64 on the device, cast once.

    The head is no longer tied: the final norm is folded into it, while the embedding is only rotated.

    Args:
        checkpoint: The model as it is.
        family: Its architecture.
        device: Where products are computed.
        seed: Seed of the signs of Q = diag(signs)·H.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, device: torch.device, seed: int) -> None:
        super().__init__(checkpoint.folder)
        self.family, self.device = family, device
        self.signs_D = random_signs(family.hidden_size, seed).to(device, torch.float64)
        self.hidden = hadamard_factors(family.hidden_size, device=device)
        self.head = hadamard_factors(family.head_dim, device=device)

    def _rotate(self, x: Tensor, dim: int = -1) -> Tensor:
        """x·Q along a dimension of size D, float64."""
        x = x.to(self.device, torch.float64)
        signs = self.signs_D if dim == -1 else self.signs_D.unsqueeze(-1)
        return apply_hadamard(x * signs, self.hidden, dim=dim)

    def head_name(self, tied: bool) -> str:
        """The head is a tensor of its own."""
        return HEAD

    def read_shared(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Embedding, final norm (ones), or head, rotated in slices of rows."""
        if name == FINAL_NORM:
            return torch.ones(self.family.hidden_size, device=device, dtype=dtype)
        stored_name = super().head_name(self.family.tied) if name == HEAD else name
        stored = super().read_shared(stored_name, torch.device("cpu"), None)
        scale_D = super().read_shared(FINAL_NORM, self.device, torch.float64) if name == HEAD else 1.0
        rows = [
            self._rotate(rows_D.to(self.device).double() * scale_D).to(device, dtype) for rows_D in stored.split(8192)
        ]
        return torch.cat(rows)

    def read_layer(self, index: int, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of a block with norms folded and rotations applied."""
        tensors = super().read_layer(index, self.device)
        for entry in LINEAR_INPUTS:
            if entry.norm is None:
                continue
            norm = f"{entry.norm}.weight"
            for name in entry.linears:
                folded = tensors[f"{name}.weight"].double() * tensors[norm].double()
                rotated = self._rotate(folded)
                tensors[f"{name}.weight"] = rotated if name == VALUE else rotated.to(device, dtype)  # cast once
            tensors[norm] = torch.ones_like(tensors[norm])
        for name in RESIDUAL_WRITERS:
            weight_OI = tensors[f"{name}.weight"].double()
            if name in ATTENTION_OUTPUT.linears:
                heads = weight_OI.unflatten(-1, (-1, self.family.head_dim))
                weight_OI = apply_hadamard(heads, self.head).flatten(-2)
            tensors[f"{name}.weight"] = self._rotate(weight_OI, dim=-2).to(device, dtype)
            if (bias := f"{name}.bias") in tensors:
                tensors[bias] = self._rotate(tensors[bias])
        for part in (f"{VALUE}.weight", f"{VALUE}.bias"):
            if part in tensors:
                value = tensors[part].to(self.device, torch.float64)
                heads = value.unflatten(0, (-1, self.family.head_dim))
                tensors[part] = apply_hadamard(heads, self.head, dim=1).flatten(0, 1)
        return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
