import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisup_lightning.quant.affine import dequantize, quantize
from bisup_lightning.quant.clipping import search_weight_clip
from bisup_lightning.quant.gptq import ClippedSegment, accumulate_hessian, gptq_quantize
from bisup_lightning.quant.spec import QuantSpec
from tests import reference_gptq


def problem(rows, features, seed=0, tokens=None, dtype=torch.float64):
    """A weight and the Hessian of correlated inputs whose channels differ widely in size."""
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(rows, features, generator=generator, dtype=dtype)
    mix_II = torch.randn(features, features, generator=generator, dtype=dtype) / features**0.5
    sizes_I = torch.randn(features, generator=generator, dtype=dtype).exp()
    x_TI = torch.randn(tokens or 4 * features, features, generator=generator, dtype=dtype)
    x_TI = (x_TI + 2 * x_TI @ mix_II) * sizes_I
    return w_OI, accumulate_hessian(torch.zeros(features, features, dtype=dtype), x_TI)


def whole(w_OI, spec, clip_OG=None):
    return [ClippedSegment(w_OI.shape[1], spec, clip_OG)]


def assert_equals_reference(w_OI, hessian_II, segments, **options):
    fast = gptq_quantize(w_OI, hessian_II, segments, blocksize=16, **options)
    parts = [
        (columns, spec and spec.bits, spec and spec.group_size, None if clip is None else clip.expand(len(w_OI), -1))
        for columns, spec, clip in segments
    ]
    for got, (codes, scale_OG) in zip(fast, reference_gptq.gptq(w_OI, hessian_II, parts, **options), strict=True):
        torch.testing.assert_close(got.codes.double(), codes, rtol=0, atol=1e-9)
        if scale_OG is not None:
            torch.testing.assert_close(got.scale_OG, scale_OG, rtol=1e-9, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(3, None), (4, 8), (3, 24), (4, 48)])
def test_equals_the_slow_reference(bits, group_size, searched, act_order):
    w_OI, hessian_II = problem(7, 48)
    spec = QuantSpec(bits, group_size=group_size)
    clip_OG = None if searched else torch.rand(7, spec.groups(48), generator=torch.Generator().manual_seed(1)) / 2 + 0.5
    assert_equals_reference(w_OI, hessian_II, whole(w_OI, spec, clip_OG), act_order=act_order)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    group_size=st.sampled_from([None, 8, 16]),
    outlier=st.sampled_from([QuantSpec(8), QuantSpec(8, group_size=8), None]),
    act_order=st.booleans(),
    damp=st.sampled_from([0.003, 0.01, 0.3]),
)
def test_outliers_equal_the_slow_reference(seed, group_size, outlier, act_order, damp):
    w_OI, hessian_II = problem(5, 40, seed)
    segments = [ClippedSegment(32, QuantSpec(3, group_size=group_size)), ClippedSegment(8, outlier)]
    assert_equals_reference(w_OI, hessian_II, segments, act_order=act_order, damp=damp)


def test_float32_walks_almost_the_same_way():
    w_OI, hessian_II = problem(32, 96)
    segments = whole(w_OI, QuantSpec(4, group_size=32))
    (exact,) = gptq_quantize(w_OI, hessian_II, segments)
    (single,) = gptq_quantize(w_OI.float(), hessian_II.float(), segments)
    assert single.scale_OG.dtype == torch.float32
    assert (single.codes == exact.codes).double().mean() > 0.99


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 8, 48, 96])
def test_blocksize_changes_nothing(group_size, act_order):
    w_OI, hessian_II = problem(9, 192)
    segments = [ClippedSegment(96, QuantSpec(3, group_size=group_size)), ClippedSegment(96, QuantSpec(6))]
    results = [gptq_quantize(w_OI, hessian_II, segments, blocksize=b, act_order=act_order) for b in (1, 32, 128)]
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got.codes, expected.codes)
            torch.testing.assert_close(got.scale_OG, expected.scale_OG, rtol=1e-12, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_output_error_is_below_plain_rounding(group_size, bits, act_order):
    spec = QuantSpec(bits, group_size=group_size)
    for seed in range(3):
        w_OI, hessian_II = problem(24, 256, seed, dtype=torch.float32)
        clip_OG = search_weight_clip(w_OI, spec)
        (result,) = gptq_quantize(w_OI, hessian_II, whole(w_OI, spec, clip_OG), act_order=act_order)
        plain = dequantize(*quantize(w_OI, spec, clip_OG))
        error = reference_gptq.output_error(w_OI, result.dequantize(), hessian_II)
        assert error < 0.8 * reference_gptq.output_error(w_OI, plain, hessian_II)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 8, 16, 48]),
    granularity=st.sampled_from(["row", "group", "tensor"]),
    searched=st.booleans(),
    act_order=st.booleans(),
)
def test_uncorrelated_inputs_mean_plain_rounding(seed, bits, group_size, granularity, searched, act_order):
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(6, 48, generator=generator)
    spec = QuantSpec(bits, granularity=granularity, group_size=group_size)
    clip_OG = search_weight_clip(w_OI, spec, torch.bfloat16)
    segments = whole(w_OI, spec, None if searched else clip_OG)
    (result,) = gptq_quantize(
        w_OI, torch.rand(48, generator=generator).diag(), segments, act_order=act_order, scale_dtype=torch.bfloat16
    )
    codes, scale_OG, _ = quantize(w_OI, spec, clip_OG, torch.bfloat16)
    assert result.codes.dtype == torch.int16
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.scale_OG, scale_OG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damp", [0.0, 1e-12, 0.01])
def test_fewer_tokens_than_channels(damp, dtype):
    w_OI, hessian_II = problem(16, 64, tokens=20, dtype=dtype)
    spec = QuantSpec(3)
    clip_OG = search_weight_clip(w_OI, spec)
    (result,) = gptq_quantize(w_OI, hessian_II, whole(w_OI, spec, clip_OG), damp=damp)
    plain = dequantize(*quantize(w_OI, spec, clip_OG))
    assert reference_gptq.output_error(w_OI, result.dequantize(), hessian_II) < 0.5 * reference_gptq.output_error(
        w_OI, plain, hessian_II
    )


def test_silent_columns_are_rounded_and_touch_nothing():
    w_OI, hessian_II = problem(8, 32)
    silent = [0, 13, 31]
    hessian_II[silent], hessian_II[:, silent] = 0, 0
    segments = whole(w_OI, QuantSpec(4), torch.ones(1, 1))
    assert_equals_reference(w_OI, hessian_II, segments)
    (result,) = gptq_quantize(w_OI, hessian_II, segments)
    assert torch.equal(result.codes[:, silent], quantize(w_OI, QuantSpec(4))[0][:, silent])
    (result,) = gptq_quantize(w_OI, torch.zeros_like(hessian_II), segments, damp=0)
    assert torch.equal(result.codes, quantize(w_OI, QuantSpec(4))[0])


def test_unquantized_outliers_absorb_the_error():
    w_OI, hessian_II = problem(8, 64)
    segments = [ClippedSegment(48, QuantSpec(3)), ClippedSegment(16, None)]
    normal, outliers = gptq_quantize(w_OI.bfloat16(), hessian_II.float(), segments)
    assert outliers.scale_OG is None
    assert outliers.codes.dtype == torch.bfloat16
    values = normal.dequantize()
    kept = torch.cat([values, w_OI[:, 48:]], 1)
    moved = torch.cat([values, outliers.dequantize()], 1)
    assert reference_gptq.output_error(w_OI, moved, hessian_II) < 0.9 * reference_gptq.output_error(
        w_OI, kept, hessian_II
    )


def test_only_the_direction_of_the_hessian_counts_and_nothing_given_is_changed():
    w_OI, hessian_II = problem(8, 32)
    before = w_OI.clone(), hessian_II.clone()
    segments = whole(w_OI, QuantSpec(3, group_size=16))
    (result,) = gptq_quantize(w_OI, hessian_II, segments)
    (scaled,) = gptq_quantize(w_OI, 2.0**-9 * hessian_II, segments)
    assert torch.equal(result.codes, scaled.codes)
    assert torch.equal(w_OI, before[0])
    assert torch.equal(hessian_II, before[1])


def test_scales_are_stored_as_asked():
    w_OI, hessian_II = problem(8, 32, dtype=torch.float32)
    (result,) = gptq_quantize(
        w_OI, hessian_II, whole(w_OI, QuantSpec(3, group_size=8)), act_order=True, scale_dtype=torch.float16
    )
    assert torch.equal(result.scale_OG, result.scale_OG.half().float())
    assert result.codes.min() >= -4
    assert result.codes.max() <= 3


def test_hessian_is_a_sum_over_batches():
    x_BTI = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    hessian_II = torch.zeros(8, 8)
    assert accumulate_hessian(hessian_II, x_BTI[:1]) is hessian_II
    accumulate_hessian(hessian_II, x_BTI[1:])
    x_TI = x_BTI.reshape(15, 8).double()
    torch.testing.assert_close(hessian_II.double(), x_TI.T @ x_TI, rtol=1e-5, atol=1e-5)
    exact_II = accumulate_hessian(torch.zeros(8, 8, dtype=torch.float64), x_BTI)
    torch.testing.assert_close(exact_II, x_TI.T @ x_TI)
    with pytest.raises(ValueError, match="bfloat16"):
        accumulate_hessian(torch.zeros(8, 8, dtype=torch.bfloat16), x_BTI)


@pytest.mark.parametrize(
    ("segments", "options", "message"),
    [
        ([ClippedSegment(32, QuantSpec(4, symmetric=False))], {}, "symmetric"),
        ([ClippedSegment(16, QuantSpec(4))], {}, "cover"),
        ([ClippedSegment(32, QuantSpec(4)), ClippedSegment(0, None)], {}, "cover"),
        ([], {}, "cover"),
        ([ClippedSegment(32, QuantSpec(4, group_size=24))], {}, "divide"),
        ([ClippedSegment(32, QuantSpec(4), torch.ones(5, 1))], {}, "broadcast"),
        ([ClippedSegment(32, QuantSpec(4), torch.ones(4, 2))], {}, "broadcast"),
        ([ClippedSegment(32, QuantSpec(4))], {"blocksize": 0}, "blocksize"),
        ([ClippedSegment(32, QuantSpec(4))], {"damp": -1.0}, "damp"),
    ],
)
def test_refuses_what_it_cannot_do(segments, options, message):
    w_OI, hessian_II = problem(4, 32)
    with pytest.raises(ValueError, match=message):
        gptq_quantize(w_OI, hessian_II, segments, **options)


def test_refuses_what_is_no_hessian():
    w_OI, hessian_II = problem(4, 32)
    segments = whole(w_OI, QuantSpec(4))
    with pytest.raises(ValueError, match="Hessian"):
        gptq_quantize(w_OI, hessian_II[:16, :16], segments)
    for bad_II in (-hessian_II, hessian_II * torch.nan, hessian_II * torch.inf):
        with pytest.raises(ValueError, match="not finite or not positive"):
            gptq_quantize(w_OI, bad_II, segments)
