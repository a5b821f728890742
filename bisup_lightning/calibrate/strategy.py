"""How a Trainer treats a device that goes on with the next block: it keeps what is there, and does not wait."""

from contextlib import nullcontext

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.strategies import SingleDeviceStrategy

from bisup_lightning.data.streams import side_stream


class OneOfManyBlocks(SingleDeviceStrategy):
    """One device, which keeps its memory and what was trained.

    Before and behind a training, Lightning's own gives a GPU's cached memory back, which waits for all that it
    computes, and the next block asks for it again; it also moves module and optimizer to the host.
    """

    def setup(self, trainer: Trainer) -> None:
        """As Lightning does it, without the accelerator's part, which is that memory alone."""
        assert self.model is not None
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        """Likewise."""
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

    def setup_data(self) -> None:
        """As Lightning does it; no batch is fetched yet."""
        device = self.trainer.strategy.root_device
        with torch.cuda.stream(side_stream("counting", device)) if device.type == "cuda" else nullcontext():
            super().setup_data()
