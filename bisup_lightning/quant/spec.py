"""What it means to quantize a tensor, as a small value that travels instead of a bag of arguments."""

from dataclasses import dataclass, replace
from typing import Any, Literal

MIN_SCALE = 2.0**-24  # a row of zeros still needs a scale; the smallest number that every 16-bit float format holds

Granularity = Literal["row", "group", "tensor", "head", "token"]


@dataclass(frozen=True)
class QuantSpec:
    """How the last dimension of a tensor becomes N-bit integers (paper §3, eq. 1-3).

    Args:
        bits: Width of the integers, 2 to 8.
        symmetric: Whether codes span [-2^(N-1), 2^(N-1)-1] around zero; otherwise [0, 2^N-1] above the minimum.
        granularity: What shares one learned clip value (`row`: one for each output row and group; `group`: one for each
            group, shared by the rows; `tensor`: one for all), or what shares one scale of keys and values
            (`head`: each head of a token; `token`: all heads of a token).
        group_size: Number of neighbouring elements that share a scale; null means the whole row.

    Raises:
        ValueError: If `bits` or `group_size` is out of range.
    """

    bits: int = 4
    symmetric: bool = True
    granularity: Granularity = "row"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 8:
            raise ValueError(f"group_size must be at least 8, not {self.group_size}")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def groups(self, features: int) -> int:
        """Number of groups G in a row of `features` elements.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        size = self.group_size or features
        if features % size:
            raise ValueError(f"group_size {size} does not divide {features} features")
        return features // size

    def clip_shape(self, rows: int, features: int) -> tuple[int, ...]:
        """Shape of the learned clip values of a weight [rows, features]: [O, G], [1, G] or [1, 1]."""
        groups = self.groups(features)
        if self.granularity == "tensor":
            return (1, 1)
        return (rows if self.granularity == "row" else 1, groups)


@dataclass(frozen=True)
class Precision:
    """The quantizers of a model: every linear's weight and input, and the KV cache (paper §5.1).

    Args:
        weights: Weights of all linears in the blocks; symmetric.
        activations: Inputs of the same linears, symmetric, per token; null leaves them in full precision.
        kv: Keys after RoPE and values, per token; null leaves them in full precision.

    Raises:
        ValueError: If a quantizer's symmetry or granularity has no meaning in its place.
    """

    weights: QuantSpec = QuantSpec(4)
    activations: QuantSpec | None = QuantSpec(4)
    kv: QuantSpec | None = QuantSpec(4, symmetric=False, granularity="head")

    def __post_init__(self) -> None:
        for place, spec in {"weights": self.weights, "activations": self.activations}.items():
            if spec and not spec.symmetric:
                raise ValueError(f"precision.{place}.symmetric must be true: integer products need codes around zero")
            if spec and spec.granularity not in ("row", "group", "tensor"):
                raise ValueError(f"precision.{place}.granularity must be row, group or tensor, not {spec.granularity}")
        if self.kv and self.kv.granularity not in ("head", "token"):
            raise ValueError(f"precision.kv.granularity must be head or token, not {self.kv.granularity}")
        if self.kv and self.kv.group_size is not None:
            raise ValueError("precision.kv.group_size must be null: keys and values are scaled by head or by token")

    @property
    def name(self) -> str:
        """The field's shorthand, such as W4A4KV4 or W3A3KV3-g128; 16 bits stand for full precision."""
        activations, kv = (16 if spec is None else spec.bits for spec in (self.activations, self.kv))
        group = self.weights.group_size
        return f"W{self.weights.bits}A{activations}KV{kv}" + (f"-g{group}" if group else "")


@dataclass(frozen=True)
class Scheme(Precision):
    """A precision together with what a transform leaves to be done at run time: all that a fused block depends on.

    Args:
        weights: See Precision.
        activations: See Precision.
        kv: See Precision.
        hadamard: Rotate the inputs of o_proj (across heads) and down_proj before they are quantized, and quantize keys
            in a rotated basis (QuaRot).
        outliers: Number of channels, moved to the end of every linear's input, with a quantizer of their own (Atom).
        outlier_bits: Their width; null keeps them in full precision.
    """

    hadamard: bool = False
    outliers: int = 0
    outlier_bits: int | None = 8

    @classmethod
    def of(cls, precision: Precision, **at_run_time: Any) -> "Scheme":
        """A precision with what a transform adds."""
        return cls(precision.weights, precision.activations, precision.kv, **at_run_time)

    def segments(self, features: int, spec: QuantSpec | None) -> tuple["Segment", ...]:
        """How a row of `features` elements is split: normal channels under `spec`, then the outliers.

        Raises:
            ValueError: If there are no channels left, or a group size does not divide them.
        """
        if features <= self.outliers:
            raise ValueError(f"{self.outliers} outliers leave nothing of {features} features")
        normal = Segment(features - self.outliers, spec)
        if spec is not None:
            spec.groups(normal.columns)
        if not self.outliers:
            return (normal,)
        wide_spec = (
            None
            if spec is None or self.outlier_bits is None
            else replace(spec, bits=self.outlier_bits, group_size=None)
        )
        return normal, Segment(self.outliers, wide_spec)


@dataclass(frozen=True)
class Segment:
    """Neighbouring columns under one quantizer; None leaves them as they are."""

    columns: int
    spec: QuantSpec | None
