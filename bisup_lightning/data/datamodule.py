"""Batches (x_q, target, rows) of one block for Lightning."""

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.streams import moved, pick


class BlockBatches:
    """A loader of shuffled batches, one epoch for each iteration; the order depends on seed and epoch alone.

    Every batch takes one sequence of each lane (see `Share`), and each lane is shuffled by itself: so the batches are
    the same for any number of processes, each of which gets its part of them. Lightning saves and restores the state
    with a checkpoint, so that training goes on at the batch where it stopped.

    Args:
        inputs: The streams.
        batch_size: Sequences in a batch, of all processes together; the last one may be smaller.
        seed: Seed of the shuffling.
        begin_epoch: Called with each epoch's number before its first batch is taken from the streams.
    """

    def __init__(
        self, inputs: LayerInputs, batch_size: int, seed: int, begin_epoch: Callable[[int], None] | None = None
    ) -> None:
        self.inputs, self.batch_size, self.seed, self.begin_epoch = inputs, batch_size, seed, begin_epoch
        self.epoch, self.position = 0, 0  # of the next batch

    def __len__(self) -> int:
        return -(-self.inputs.q.shape[0] * self.inputs.share.members // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        if self.begin_epoch is not None:
            self.begin_epoch(self.epoch)
        device, streams = self.inputs.device, (self.inputs.q, self.inputs.fp)
        left = self._rows()[self.position :]
        batches = ((*(pick(stream, rows, device) for stream in streams), rows) for rows in left)
        for x_BTD, target_BTD, rows in moved(batches, device):
            self.position += 1
            yield x_BTD, target_BTD, rows

    def _rows(self) -> list[Tensor]:
        """Which rows of the streams make up each batch of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        share, count = self.inputs.share, self.inputs.q.shape[0] * self.inputs.share.members
        orders = [  # of all lanes, so that all processes draw alike
            torch.randperm(len(range(lane, count, self.batch_size)), generator=generator).tolist()
            for lane in range(self.batch_size)
        ]
        lanes = share.lanes(self.batch_size)
        own = orders[lanes.start : lanes.stop]
        batches = [
            [order[number] * len(own) + place for place, order in enumerate(own) if number < len(order)]
            for number in range(len(self))
        ]
        rows = torch.tensor([row for batch in batches for row in batch], device=self.inputs.q.device)
        return list(rows.split([len(batch) for batch in batches]))

    def state_dict(self) -> dict[str, int]:
        """Where the next batch stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        self.epoch, self.position = state["epoch"], state["position"]


class BlockDataModule(LightningDataModule):
    """Streams the cached inputs of one block.

    Args:
        inputs: The streams, with x_fp already advanced to the target.
        batch_size: Sequences in a batch.
        seed: Seed of the shuffling.
        begin_epoch: Called with each epoch's number before its first batch is taken from the streams.
    """

    def __init__(
        self, inputs: LayerInputs, batch_size: int, seed: int, begin_epoch: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.batches = BlockBatches(inputs, batch_size, seed, begin_epoch)

    def train_dataloader(self) -> BlockBatches:
        """Epochs of (x_q, target, rows): [B, T, D] twice, and [B], where in the streams they stand."""
        return self.batches
