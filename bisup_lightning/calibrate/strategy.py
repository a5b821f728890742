"""Where a Trainer puts a block: on a device that goes on with the next one."""

from lightning.pytorch.strategies import SingleDeviceStrategy


class OneOfManyBlocks(SingleDeviceStrategy):
    """One device; what was trained stays there, and nothing keeps it.

    Behind a training, Lightning's own strategy moves everything to the host and gives the device's cached memory back,
    which the next block asks for again.
    """

    def teardown(self) -> None:
        """Let go of the optimizer, which Python's collector would find in a cycle of references, and only much later."""
        self.optimizers, self.lr_scheduler_configs = [], []
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()
