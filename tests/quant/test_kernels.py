"""The Triton kernels against the composition that they stand for, which tests/quant/test_affine.py holds to float64.

Need a GPU; or, in float32, `TRITON_INTERPRET=1` and the package triton.
"""

import os

import pytest
import torch

from bisup_lightning.model.linear import InputQuantizer, QuantLinear
from bisup_lightning.quant import affine, clipping, operators
from bisup_lightning.quant.gated import Gated
from bisup_lightning.quant.spec import QuantSpec, Segment

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and operators.HAS_TRITON
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not INTERPRETED, reason="needs a CUDA device"),
]
STORAGE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cuts bfloat16 off instead of rounding
SHAPES = [
    (4, 32, 128),
    (3, 128, 256),
    (4, None, 1160),
    (3, 600, 1200),
    (4, 640, 1280),
    (8, None, 96),
    (2, 24, 72),
]  # bits, group size, features


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(operators, "supports", lambda x, rank=0: x.dtype in operators.STORED)


@pytest.fixture
def without_kernels(monkeypatch):
    """Calls a function as it would run where there are no kernels."""

    def call(function):
        with monkeypatch.context() as patched:
            patched.setattr(operators, "supports", lambda x, rank=0: False)
            return function()

    return call


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_same_values(actual, expected):
    """But for Δ's last digit, and the few that lie halfway between two points of the grid to within a digit."""
    digits = 2e-6 if actual.dtype == torch.float32 else 1e-2
    assert ((actual - expected).abs() > digits * expected.abs()).float().mean() <= 5e-3


def assert_same_gradients(actual, expected, dtype):
    """Sums of many terms in another order.

    In a narrow dtype, autograd's own composition rounds gradients of A and B, too, and there are values just halfway
    between two points of the grid: each changes the sums that it is part of.
    """
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if dtype != torch.float32:
            digits = 0.2 if other.numel() == 1 else 0.1
            off = (one - other).float().abs() > digits * other.float().square().mean().sqrt()
            assert off.float().mean() <= 0.05
            continue
        digits = 1e-3 if other.numel() == 1 else 1e-4  # the terms of a lone clip value's gradient nearly cancel
        assert (one - other).float().norm() <= digits * other.float().norm().clamp_min(1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "features"), SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_activations_round_alike_with_the_same_gradients(
    without_kernels, dtype, bits, group_size, features, granularity
):
    segment = Segment(features, QuantSpec(bits, granularity=granularity, group_size=group_size))
    quantizer = InputQuantizer([segment], 0.8, None).to(DEVICE)
    x_BTI = random(3, 7, features + 5, dtype=dtype)[..., 5:].requires_grad_()  # strided rows
    x_BTI.data[0, 0] = 0
    grad_BTI = random(3, 7, features, dtype=dtype, seed=1)

    def run():
        out_BTI = quantizer(x_BTI)
        return out_BTI, torch.autograd.grad(out_BTI, [x_BTI, *quantizer.clips], grad_BTI)

    out, gradients = run()
    expected, expected_gradients = without_kernels(run)
    assert_same_values(out, expected)
    assert_same_gradients(gradients, expected_gradients, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "features"), SHAPES)
def test_a_gate_is_rounded_alike_with_the_same_gradients(without_kernels, dtype, bits, group_size, features):
    segment = Segment(features, QuantSpec(bits, group_size=group_size))
    clip_G = torch.full((segment.spec.groups(features),), 0.8, device=DEVICE).requires_grad_()
    gate = Gated(*(random(3, 16, features, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 2)))
    gate.up.data[0, 0] = 0
    grad = random(3, 16, features, dtype=dtype, seed=1)
    inputs = [gate.gate, gate.up, clip_G]
    values, *_ = operators.round_rows(*inputs[:2], clip_G, bits, features // len(clip_G), False)
    expected = without_kernels(lambda: affine.fake_quantize(gate.product(), segment.spec, clip_G))
    assert_same_values(values, expected)
    gradients, expected_gradients = (torch.autograd.grad(x, inputs, grad) for x in (values, expected))
    assert_same_gradients(gradients, expected_gradients, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "features"), SHAPES)
@pytest.mark.parametrize(
    ("granularity", "form", "smoothing"),
    [
        ("row", "slrec", "soft"),
        ("row", "lrec", "hard"),
        ("group", "slrec", None),
        ("tensor", None, "soft"),
        ("row", None, None),
    ],
)
def test_weights_round_alike_with_the_same_gradients(
    without_kernels, dtype, bits, group_size, features, granularity, form, smoothing
):
    rows, rank, outliers = 70, 12, 8
    spec = QuantSpec(bits, granularity=granularity, group_size=group_size)
    segments = [Segment(features, spec), Segment(outliers, QuantSpec(8)), Segment(outliers, None)]
    features += 2 * outliers
    weight = random(rows, features, dtype=dtype) * 0.05
    weight[3] = 0
    linear = QuantLinear(weight, None, segments, torch.nn.Identity(), STORAGE)
    if form is not None:
        linear.add_low_rank(form, random(rows, rank, seed=2) * 0.2, random(rank, features, seed=3) * 0.02)
    factors_I = torch.nn.Parameter(random(features, seed=4).abs() + 0.5)
    if smoothing == "soft":
        linear.add_smoothing(factors_I)
    elif smoothing == "hard":
        order_I = torch.randperm(features, generator=torch.Generator().manual_seed(6))
        linear.tie_smoothing(factors_I, order_I.to(DEVICE))
    theta = [tensor for name, tensor in linear.named_parameters() if name != "clips.2"]  # that of no quantizer
    grad_OI = random(rows, features, dtype=dtype, seed=1)

    def run():
        out_OI = linear.quantized_weight(dtype)
        return out_OI, torch.autograd.grad(out_OI, theta, grad_OI)

    out, gradients = run()
    expected, expected_gradients = without_kernels(run)
    if form is None:
        assert_same_values(out, expected)
    else:  # sums of AB in another order, and W then goes to the next point of the grid
        assert ((out - expected).abs() > 1e-3 * expected.abs()).float().mean() < 0.01
    assert_same_gradients(gradients, expected_gradients, dtype)
    fused = linear.fuse()
    assert torch.equal(fused.dense_weight().to(dtype), out)  # what was learned with is what is stored
    fused.hold_dense(dtype)
    assert torch.equal(fused.held_OI, out)  # and what is computed with


@pytest.mark.parametrize("size", [24, 128, 600, 640])
def test_a_group_knows_nothing_of_the_next(size):
    """Whose AB is a hundred times as large, and where W does not hide it."""
    w_OI, a_OR, b_RI = torch.zeros(20, 2 * size, device=DEVICE), random(20, 4), random(4, 2 * size, seed=1)
    b_RI[:, size:] *= 100
    clip_OG = torch.ones(20, 2, device=DEVICE)
    given = w_OI, a_OR, b_RI, None, clip_OG, 4, size, "lrec", None, torch.float32, None
    absmax_OG = operators.round_weight(*given)[1]
    expected_OG = (a_OR @ b_RI).abs().unflatten(-1, (2, size)).amax(-1)
    torch.testing.assert_close(absmax_OG, expected_OG, rtol=1e-5, atol=1e-5)


def test_a_value_that_is_not_finite_is_seen():
    quantizer = InputQuantizer([Segment(64, QuantSpec(4))], 0.9, None).to(DEVICE)
    for value in (torch.nan, torch.inf):
        x_TI = random(3, 64)
        x_TI[1, 5] = value
        assert not quantizer(x_TI)[1].isfinite().all()


def test_gradients_are_the_same_to_the_bit_each_time():
    linear = QuantLinear(
        random(300, 256) * 0.05, None, [Segment(256, QuantSpec(4, group_size=64))], torch.nn.Identity(), STORAGE
    )
    linear.add_low_rank("slrec", random(300, 32), random(32, 256) * 0.01)
    grads = [
        torch.autograd.grad(linear.quantized_weight(torch.float32), list(linear.parameters()), random(300, 256, seed=5))
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_what_kernels_do_not_take_is_composed_or_refused(without_kernels):
    spec, x_TI = QuantSpec(4, group_size=32), random(64, 64)
    for x, clip in ((x_TI.T, random(2).abs() + 0.5), (x_TI, random(64, 2).abs() + 0.5)):

        def run(x=x, clip=clip):
            return affine.fake_quantize(x, spec, clip)

        assert_same_values(run(), without_kernels(run))
    with pytest.raises(ValueError, match="does not divide"):
        affine.fake_quantize(x_TI, QuantSpec(4, group_size=24), torch.full((2,), 0.8, device=DEVICE))


def test_where_shared_memory_is_short_a_smaller_tile_is_taken():
    from triton.runtime.errors import OutOfResources

    tried = []

    def launch(blocks):
        tried.append(blocks["size"])
        if blocks["size"] > 1:
            raise OutOfResources(2, 1, "shared memory")
        return "launched"

    variants = [{"size": size} for size in (3, 2, 1)]
    assert [operators._on_what_fits("a test", variants, launch) for _ in range(2)] == ["launched"] * 2
    assert tried == [3, 2, 1, 1]
    with pytest.raises(OutOfResources):
        operators._on_what_fits("another", variants[:2], launch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size", "features"), SHAPES)
@pytest.mark.parametrize("granularity", ["row", "group", "tensor"])
@pytest.mark.parametrize("scale_dtype", [None, STORAGE])
def test_clips_found_by_kernels_are_as_good(
    without_kernels, dtype, bits, group_size, features, granularity, scale_dtype
):
    """Another clip value is found only where two are equally good but for the order of sums."""
    w_OI = random(45, features + 3, dtype=dtype)[:, 3:]  # strided rows
    w_OI[0] = 0
    spec = QuantSpec(bits, granularity=granularity, group_size=group_size)
    found = clipping.search_weight_clip(w_OI, spec, scale_dtype)
    expected = without_kernels(lambda: clipping.search_weight_clip(w_OI, spec, scale_dtype))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found != expected).float().mean() <= 0.02

    def error(clip):
        rounded = without_kernels(lambda: affine.fake_quantize(w_OI.float(), spec, clip, scale_dtype))
        return affine.to_groups((rounded - w_OI.float()).square(), spec).sum(-1).sum_to_size(clip.shape)

    torch.testing.assert_close(error(found), error(expected), rtol=1e-4, atol=1e-12)
