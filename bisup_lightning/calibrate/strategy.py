"""Where a Trainer puts a block: on a device that goes on with the next one."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy


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
