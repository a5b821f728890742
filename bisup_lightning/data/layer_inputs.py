"""The two streams of hidden states that enter a block: full-precision and quantized (Algorithm A1, lines 3, 6, 15).

Shape suffixes: N sequences, T tokens, D hidden size, B batch.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bisup_lightning.data.share import WHOLE, Share
from bisup_lightning.data.streams import StreamStorage
from bisup_lightning.data.transfer import moved
from bisup_lightning.errors import UserError
from bisup_lightning.quant.compiled import compiled_on_gpu

Forward = Callable[[Tensor], Tensor]
log = logging.getLogger(__name__)


class LayerInputs:
    """Inputs x_fp and x_q of the next block, [N, T, D] each, on the device, on the host or in a file.

    `advance_fp` turns x_fp into the block's full-precision output, which is then both the target of its calibration
    and the next block's x_fp. Losses and mean squares are tensors on the device: only reading one waits
    for it.

    Args:
        x_fp: Full-precision inputs.
        x_q: Inputs that the quantized predecessors gave.
        device: Where blocks compute.
        batch_size: Sequences to compute at a time.
        home: Where the streams live; None for where x_fp lies.
        share: Which part of the text these N sequences are, where several processes hold parts; losses and mean
            squares are those of the whole text.
        let_go: Called where the device runs out of memory, before fewer sequences are computed at a time: frees what is
            kept for speed alone, and returns whether there was any.

    Attributes:
        early: The block's full-precision inputs, where it learns on them first.
        micro_batch: Sequences that are computed at a time: `batch_size`, halved whenever the device ran out of memory.
    """

    def __init__(
        self,
        x_fp: Tensor,
        x_q: Tensor,
        device: torch.device,
        batch_size: int,
        home: StreamStorage | None = None,
        share: Share = WHOLE,
        let_go: Callable[[], bool] = lambda: False,
    ) -> None:
        self.fp, self.q = x_fp, x_q
        self.early: Tensor | None = None
        self.device, self.micro_batch = device, batch_size
        self.home, self.share = home or StreamStorage("device", x_fp.device, Path()), share
        self.let_go = let_go

    @property
    def num_tokens(self) -> int:
        """N · T, of the whole text."""
        return self.fp.shape[0] * self.fp.shape[1] * self.share.members

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Compute half as many sequences at a time from now on, which changes no result but takes longer.

        Raises:
            UserError: If it is one sequence already.
        """
        if self.micro_batch == 1:
            raise UserError(
                "data.seq_len: the device is too small for even one sequence of a block; give a smaller data.seq_len"
            ) from error
        log.warning(f"out of device memory with {self.micro_batch} sequences at a time; going on with half of them")
        self.micro_batch = -(-self.micro_batch // 2)
        torch.cuda.empty_cache()

    def _for_each(self, step: Callable[..., None], *streams: Tensor, by_halves: bool = True) -> None:
        """Call `step` on every micro-batch: its slice of the N sequences, and its part of each stream on the device.

        Where the device runs out of memory, the step is taken again: with the memory that `let_go` frees, or else with
        half as many sequences.

        Raises:
            OutOfMemoryError: If `let_go` frees nothing and `by_halves` is false.
            UserError: If not even one sequence fits.
        """
        start, end = 0, len(streams[0])
        while start < end:
            batches = [slice(at, at + self.micro_batch) for at in range(start, end, self.micro_batch)]
            parts = moved((tuple(stream[batch] for stream in streams) for batch in batches), self.device)
            try:
                for batch, part in zip(batches, parts, strict=True):
                    step(batch, *part)
                    start = batch.stop
            except torch.OutOfMemoryError as error:
                if self.let_go():
                    continue
                if not by_halves:
                    raise
                self.halve(error)

    @torch.no_grad()
    def advance_fp(self, run: Forward) -> None:
        """Replace x_fp by the full-precision block's output."""

        def step(batch: slice, x_BTD: Tensor) -> None:
            self.fp[batch] = run(x_BTD).to(self.fp)

        self._for_each(step, self.fp)

    def loss_q(self, run: Forward, sample: int | None = None) -> Tensor:
        """Mean square error of a quantized block's output on x_q against the target (eq. 8).

        Args:
            run: The block.
            sample: How many sequences of the text to compute, from the first on; None for all.
        """
        return self._loss(self.q, run, sample)

    def loss_of(self, outputs_NTD: Tensor, sample: int | None = None) -> Tensor:
        """As `loss_q`, of outputs [N, T, D] that the block has given already."""
        return self._loss(outputs_NTD, lambda y_BTD: y_BTD, sample)

    @torch.no_grad()
    def _loss(self, x_NTD: Tensor, run: Forward, sample: int | None) -> Tensor:
        count = len(x_NTD) if sample is None else min(len(x_NTD), max(1, sample // self.share.members))
        squares = torch.zeros((), dtype=torch.float64, device=self.device)

        def step(batch: slice, x_BTD: Tensor, target_BTD: Tensor) -> None:
            squares.add_(squared_error(run(x_BTD), target_BTD))

        self._for_each(step, x_NTD[:count], self.fp[:count])
        return self._mean(squares) * len(x_NTD) / count

    @torch.no_grad()
    def outputs_q(self, run: Forward, by_halves: bool = True) -> tuple[Tensor, Tensor]:
        """A quantized block's output on x_q, [N, T, D], and its mean square error against the target (eq. 8).

        Args:
            run: The block.
            by_halves: Whether to go on with half as many sequences at a time where the device runs out of memory.

        Raises:
            OutOfMemoryError: If the device runs out of memory and `by_halves` is false.
        """
        outputs = self.home.empty_like(self.q)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)

        def step(batch: slice, x_BTD: Tensor, target_BTD: Tensor) -> None:
            y_BTD = run(x_BTD)
            squares.add_(squared_error(y_BTD, target_BTD))
            outputs[batch] = y_BTD.to(outputs)

        self._for_each(step, self.q, self.fp, by_halves=by_halves)
        return outputs, self._mean(squares)

    @torch.no_grad()
    def for_each_q(self, run: Forward) -> None:
        """Run a block over x_q for its side effects, such as recorded statistics; its outputs are dropped."""

        def step(batch: slice, x_BTD: Tensor) -> None:
            run(x_BTD)

        self._for_each(step, self.q)

    def advance_q(self, outputs: Tensor) -> None:
        """Replace x_q by the fused block's output."""
        self.q = outputs

    @torch.no_grad()
    def mean_square_target(self) -> Tensor:
        """Mean square of the target, the scale of a relative error."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)

        def step(batch: slice, x_BTD: Tensor) -> None:
            squares.add_(sum_of_squares(x_BTD))

        self._for_each(step, self.fp)
        return self._mean(squares)

    def _mean(self, squares: Tensor) -> Tensor:
        self.share.sum_([squares])
        return squares / (self.fp.numel() * self.share.members)


@compiled_on_gpu(dynamic=True)
def squared_error(y: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences, taken in float32 and added up in float64."""
    return (y.float() - target.float()).square().sum(dtype=torch.float64)


@compiled_on_gpu(dynamic=True)
def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squares, taken in float32 and added up in float64."""
    return x.float().square().sum(dtype=torch.float64)
