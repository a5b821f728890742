"""A finished block is saved, so that an interrupted run resumes behind it."""

from bisup_lightning.calibrate.driver import BlockResult, BlockWalk
from bisup_lightning.calibrate.events import WalkCallback


class BlockCheckpoint(WalkCallback):
    """Writes each finished block, the streams behind it and the manifest, in that order."""

    saves_blocks = True

    def on_block_end(self, walk: BlockWalk, result: BlockResult) -> None:
        """Save the block."""
        streams = {"x_fp": walk.inputs.fp, "x_q": walk.inputs.q, "prompt": walk.prompt_1PD}
        walk.store.save_block(result.index, result.tensors, result.metrics(), streams)
