"""A Trainer on a device that goes on with the next block: it keeps what is there, and does not wait."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

from bisup_lightning.data.transfer import side_stream


class BlockTrainer(Trainer):
    """Trains one of many blocks, as the only process that it knows of, also where several walk together.

    Lightning's own would have all processes take the same number of steps. Before and behind a training it also gives
    a GPU's cached memory back, which waits for all that the GPU computes, and the next block asks for it again.

    Args:
        device: Where the block is.
        epochs: To train for.
        settings: A Trainer's, beyond those that are the same for all blocks.
    """

    def __init__(self, device: torch.device, epochs: int, **settings: Any) -> None:
        super().__init__(
            devices=1 if device.index is None else [device.index],
            strategy=OneOfManyBlocks(device),
            max_epochs=epochs,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        self.fit_loop = BlockFitLoop(self)
        self._checkpoint_connector = BlockCheckpointConnector(self)


class OneOfManyBlocks(SingleDeviceStrategy):
    """Keeps the trained module on the device, and the device's cached memory.

    Lightning's own empties the cache before and behind a training, and moves the module to the CPU behind it.
    """

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class BlockFitLoop(_FitLoop):
    """A Trainer's loop over epochs, which begins while the device is still busy.

    Lightning's own adds up the lengths of loaders on the device and reads the sum, for which the host would wait until
    the device has nothing else to do. Here that goes beside what the device computes.

    Args:
        trainer: Whose loop this becomes; its limits stay.
    """

    def __init__(self, trainer: Trainer) -> None:
        usual = trainer.fit_loop
        super().__init__(trainer, min_epochs=usual.min_epochs, max_epochs=usual.max_epochs)
        self.epoch_loop = usual.epoch_loop

    @override
    def setup_data(self) -> None:
        device = self.trainer.strategy.root_device  # no batch is fetched yet
        with torch.cuda.stream(side_stream("counting", device)) if device.type == "cuda" else nullcontext():
            super().setup_data()


class BlockCheckpointConnector(_CheckpointConnector):
    """Gives cached memory back only behind a checkpoint that took some; Lightning's own does before every training."""

    @override
    def resume_end(self) -> None:
        if self._loaded_checkpoint:
            super().resume_end()
