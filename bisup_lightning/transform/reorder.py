"""Atom (arXiv 2310.19102): channels in order of their strength, the strongest kept at higher precision."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.quant.spec import Precision, Scheme
from bisup_lightning.transform.transform import Transform


class Atom(Transform):
    """Moves the channels of every linear input with the largest Σx² to the end and quantizes them apart.

    Linears with one input share its order. The MLP's activation takes its order from gate and up, whose rows are
    permuted once; the others are permuted at run time. Without groups and with 16-bit outliers this is QUIK.

    Args:
        outliers: Number of channels kept at higher precision.
        outlier_bits: Their width; null keeps them in full precision.
    """

    needs_statistics = True

    def __init__(self, outliers: int = 128, outlier_bits: int | None = 8) -> None:
        if outliers < 1:
            raise ValueError(f"transform.outliers must be at least 1, not {outliers}")
        if outlier_bits is not None and not 2 <= outlier_bits <= 8:
            raise ValueError(f"transform.outlier_bits must be 2 to 8, or null for full precision, not {outlier_bits}")
        self.outliers, self.outlier_bits = outliers, outlier_bits

    def scheme(self, precision: Precision) -> Scheme:
        """Every linear input ends in a segment of outliers."""
        return Scheme.of(precision, outliers=self.outliers, outlier_bits=self.outlier_bits)

    def orders(self, statistics: InputStatistics) -> Mapping[str, Tensor]:
        """Channels by rising Σx², so that groups hold channels of like strength."""
        return {name: torch.argsort(sum_I, stable=True) for name, sum_I in statistics.square_sum.items()}
