"""Batches (inputs, target) of one block for Lightning."""

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.transfer import moved, pick


class BlockBatches:
    """A loader of shuffled batches, one epoch for each iteration; the order depends on seed and epoch alone.

    Every batch takes one sequence of each lane (see `Share`), and each lane is shuffled by itself: so the batches are
    the same for any number of processes, each of which gets its part of them. Lightning saves and restores the state
    with a checkpoint, so that training goes on at the batch where it stopped.

    Args:
        inputs: The streams.
        batch_size: Sequences in a batch, of all processes together; the last one may be smaller.
        seed: Seed of the shuffling.
        fp_epochs: First epochs, whose inputs are full-precision ones; the others' are x_q.
        receive_final: Called before x_q is needed, to put it into the streams.
    """

    def __init__(
        self,
        inputs: LayerInputs,
        batch_size: int,
        seed: int,
        fp_epochs: int = 0,
        receive_final: Callable[[LayerInputs], None] | None = None,
    ) -> None:
        self.inputs, self.batch_size, self.seed = inputs, batch_size, seed
        self.fp_epochs, self.receive_final = fp_epochs, receive_final
        self.epoch, self.position = 0, 0  # of the next batch

    def __len__(self) -> int:
        return -(-len(self.inputs.fp) * self.inputs.share.members // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        if self.epoch >= self.fp_epochs and self.receive_final is not None:
            self.receive_final(self.inputs)
        x_NTD = self.inputs.q if self.epoch >= self.fp_epochs else self.inputs.early
        assert x_NTD is not None
        device, target_NTD = self.inputs.device, self.inputs.fp
        left = self._rows()[self.position :]
        batches = ((pick(x_NTD, rows_B, device), pick(target_NTD, rows_B, device)) for rows_B in left)
        for x_BTD, target_BTD in moved(batches, device):
            self.position += 1
            yield x_BTD, target_BTD

    def _rows(self) -> list[Tensor]:
        """Which rows of the streams make up each batch of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        share, count = self.inputs.share, len(self.inputs.fp) * self.inputs.share.members
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
        rows = torch.tensor([row for batch in batches for row in batch]).to(self.inputs.fp.device, non_blocking=True)
        return list(rows.split([len(batch) for batch in batches]))

    def state_dict(self) -> dict[str, int]:
        """Where the next batch stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there."""
        self.epoch, self.position = state["epoch"], state["position"]


class BlockDataModule(LightningDataModule):
    """Gives the Trainer the cached inputs of one block.

    Args:
        batches: The loader of its training batches.
    """

    def __init__(self, batches: BlockBatches) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> BlockBatches:
        """Epochs of (inputs, target), [B, T, D] each."""
        return self.batches
