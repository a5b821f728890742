"""The two streams of hidden states that enter a block: full-precision and quantized (Algorithm A1, lines 3, 6, 15).

Shape suffixes: N sequences, T tokens, D hidden size, B batch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]


class LayerInputs:
    """Inputs x_fp and x_q of the next block, [N, T, D] each, on the device or on the host.

    `advance_fp` turns x_fp into the block's full-precision output, which is then both the target of its calibration
    and the next block's x_fp.

    Args:
        x_fp: Full-precision inputs.
        x_q: Inputs that the quantized predecessors gave.
        device: Where blocks compute.
        batch_size: Sequences in one forward pass.
    """

    def __init__(self, x_fp: Tensor, x_q: Tensor, device: torch.device, batch_size: int) -> None:
        self.fp, self.q = x_fp, x_q
        self.device, self.batch_size = device, batch_size

    @property
    def num_tokens(self) -> int:
        """N · T."""
        return self.fp.shape[0] * self.fp.shape[1]

    def _batches(self) -> Iterator[slice]:
        for start in range(0, self.fp.shape[0], self.batch_size):
            yield slice(start, start + self.batch_size)

    @torch.no_grad()
    def advance_fp(self, run: Run) -> None:
        """Replace x_fp by the full-precision block's output."""
        for batch in self._batches():
            self.fp[batch] = run(self.fp[batch].to(self.device)).to(self.fp)

    @torch.no_grad()
    def outputs_q(self, run: Run) -> tuple[Tensor, float]:
        """What a quantized block makes of x_q, [N, T, D], and its mean square distance to the target (eq. 8)."""
        outputs = torch.empty_like(self.q)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self._batches():
            y_BTD = run(self.q[batch].to(self.device))
            target_BTD = self.fp[batch].to(self.device, non_blocking=True)
            squares += (y_BTD.float() - target_BTD.float()).square().sum(dtype=torch.float64)
            outputs[batch] = y_BTD.to(outputs)
        return outputs, squares.item() / outputs.numel()

    @torch.no_grad()
    def for_each_q(self, run: Run) -> None:
        """Run a block over x_q for what it does on the way."""
        for batch in self._batches():
            run(self.q[batch].to(self.device))

    def advance_q(self, outputs: Tensor) -> None:
        """Replace x_q by the fused block's output."""
        self.q = outputs

    def mean_square_target(self) -> float:
        """Mean square of the target, the scale of a relative error."""
        total = sum(
            self.fp[batch].to(self.device).float().square().sum(dtype=torch.float64) for batch in self._batches()
        )
        return float(total) / self.fp.numel()
