"""Batches (x_q, target) of one block for Lightning."""

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bisup_lightning.data.layer_inputs import LayerInputs


class BlockBatches(IterableDataset):
    """Shuffled batches of one epoch after another; the order depends on the seed, the block and the epoch alone.

    Args:
        inputs: The streams.
        batch_size: Sequences in a batch; the last one may be smaller.
        seed: Seed of the shuffling.
    """

    def __init__(self, inputs: LayerInputs, batch_size: int, seed: int) -> None:
        self.inputs, self.batch_size, self.seed = inputs, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.inputs.q.shape[0] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.inputs.q.shape[0], generator=generator)
        self.epoch += 1
        for indices in order.to(self.inputs.q.device).split(self.batch_size):
            yield self.inputs.q[indices], self.inputs.fp[indices]


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

    def train_dataloader(self) -> DataLoader:
        """One epoch of (x_q, target), [B, T, D] each."""
        return DataLoader(self.batches, batch_size=None)
