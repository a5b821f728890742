"""BiSup on PyTorch Lightning. Importing this package lets transformers load its checkpoints."""

__version__ = "0.1.0"

from bisup_lightning.hub import quantizer  # noqa: F401  registers "bisup" with transformers
