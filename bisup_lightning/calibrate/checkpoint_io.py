"""How Lightning's checkpoints reach the disk."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its place.

    Lightning's own way leads through the folder for temporary files: it may lie on a smaller disk, and what a killed
    process leaves there is never cleared away.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it can't be written; torch's own writer would raise another kind.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getbuffer())
