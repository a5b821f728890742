"""A transform turns a model into an equivalent one that quantizes better; each block as it is read."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bisup_lightning.model.checkpoint import Checkpoint
from bisup_lightning.model.family import Family
from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.quant.spec import Precision, Scheme


class Transform:
    """Base class of transforms; by itself it leaves a model as it is."""

    needs_statistics = False

    def scheme(self, precision: Precision) -> Scheme:
        """The precision with what this transform leaves to be done at run time."""
        return Scheme.of(precision)

    def checkpoint(self, checkpoint: Checkpoint, family: Family, device: torch.device) -> Checkpoint:
        """The same checkpoint with transformed tensors, computed on the device as they are read."""
        return checkpoint

    def orders(self, statistics: InputStatistics) -> Mapping[str, Tensor]:
        """Order of the channels [I] of each linear input, by its name, from a block's full-precision statistics."""
        return {}


class NoTransform(Transform):
    """Quantizes the model as it is."""
