"""Batches (x_q, target) of one block for Lightning."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.streams import moved, pick


class BlockBatches:
    """A loader of shuffled batches, one epoch for each iteration; the order depends on seed and epoch alone.

    Lightning saves and restores its state with a checkpoint, so that training goes on at the batch where it stopped.

    Args:
        inputs: The streams.
        batch_size: Sequences in a batch; the last one may be smaller.
        seed: Seed of the shuffling.
    """

    def __init__(self, inputs: LayerInputs, batch_size: int, seed: int) -> None:
        self.inputs, self.batch_size, self.seed = inputs, batch_size, seed
        self.epoch, self.position = 0, 0  # of the next batch

    def __len__(self) -> int:
        return -(-self.inputs.q.shape[0] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.inputs.q.shape[0], generator=generator)
        left = order.to(self.inputs.q.device).split(self.batch_size)[self.position :]
        device, streams = self.inputs.device, (self.inputs.q, self.inputs.fp)
        batches = (tuple(pick(stream, indices, device) for stream in streams) for indices in left)
        for x_BTD, target_BTD in moved(batches, device):
            self.position += 1
            yield x_BTD, target_BTD

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
    """

    def __init__(self, inputs: LayerInputs, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batches = BlockBatches(inputs, batch_size, seed)

    def train_dataloader(self) -> BlockBatches:
        """Epochs of (x_q, target), [B, T, D] each."""
        return self.batches
