import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisup_lightning.quant.affine import (
    MIN_SCALE,
    as_stored,
    dequantize,
    fake_quantize,
    quantize,
    scale_and_offset,
    storable,
    to_groups,
)
from bisup_lightning.quant.spec import QuantSpec
from tests import reference

every_bits = pytest.mark.parametrize("bits", range(2, 9))
both_symmetries = pytest.mark.parametrize("symmetric", [True, False])
SCALE_DTYPES = [None, torch.float32, torch.bfloat16, torch.float16]


def properties(max_examples):
    return settings(max_examples=max_examples, deadline=None, derandomize=True)


@st.composite
def grouped_values(draw, dtype=torch.float64):
    """(x [..., I], group size or None): normal values of any magnitude, shifted off zero, with the odd outlier."""
    group_size = draw(st.sampled_from([None, 8, 12]))
    features = draw(st.integers(1, 3)) * group_size if group_size else draw(st.integers(2, 20))
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(*leading, features, generator=generator, dtype=torch.float64)
    x = x + draw(st.sampled_from([0.0, 0.7, -4.0]))
    x[..., draw(st.integers(0, features - 1))] *= draw(st.sampled_from([1, 30]))
    return (x * 10.0 ** draw(st.integers(-4, 2))).to(dtype), group_size


def clips_for(x, group_size, seed, low=0.3, high=1.0):
    """A clip value for each group of each row, in x's dtype."""
    shape = (*x.shape[:-1], x.shape[-1] // (group_size or x.shape[-1]))
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(x.dtype)


def steps_of(x, spec, scale_G, offset_G):
    """How many scales each element lies above the offset [..., I], in float64, before rounding."""
    offset_G = torch.zeros_like(scale_G) if offset_G is None else offset_G
    x_Gg = to_groups(x, spec).double()
    return ((x_Gg - offset_G.double().unsqueeze(-1)) / scale_G.double().unsqueeze(-1)).flatten(-2)


def close(actual, expected, tolerance):
    """Within the tolerance, relative to the largest number of the tensor."""
    bound = tolerance * max(expected.abs().max().item(), 1e-30)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


# --- values -----------------------------------------------------------------------------------------------------------


@every_bits
@both_symmetries
@properties(10)
@given(
    values=grouped_values(),
    seed=st.none() | st.integers(0, 2**31),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
)
def test_float64_equals_the_reference(bits, symmetric, values, seed, scale_dtype):
    x, group_size = values
    spec = QuantSpec(bits, symmetric, group_size=group_size)
    clip = None if seed is None else clips_for(x, group_size, seed)
    codes, scale, offset = quantize(x, spec, clip, scale_dtype)
    if symmetric:
        expected_codes, expected_scale = reference.quantize_symmetric(x, bits, group_size, clip, scale_dtype)
        expected_offset = None
        assert offset is None
    else:
        expected_codes, expected_scale, expected_offset = reference.quantize_asymmetric(
            x, bits, group_size, clip, scale_dtype
        )
        assert torch.equal(offset, expected_offset)
    assert torch.equal(codes.double(), expected_codes)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-12, atol=0)
    expected = reference.dequantize(expected_codes, expected_scale, expected_offset)
    close(dequantize(codes, scale, offset), expected, 1e-12)
    close(fake_quantize(x, spec, clip, scale_dtype), expected, 1e-12)


@every_bits
@both_symmetries
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@properties(5)
@given(data=st.data())
def test_narrow_dtypes_equal_the_reference_up_to_their_rounding(bits, symmetric, dtype, tolerance, data):
    """Where float32 and float64 may fall to different sides of a half, the codes may differ by one, and only there."""
    x, group_size = data.draw(grouped_values(dtype))
    spec = QuantSpec(bits, symmetric, group_size=group_size)
    clip = clips_for(x.float(), group_size, seed=0)
    codes, scale, _ = quantize(x, spec, clip)
    expected_codes, expected_scale, expected_offset = reference.quantize(x, bits, symmetric, group_size, clip)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-6, atol=0)

    steps = steps_of(x, spec, expected_scale, expected_offset)
    near_half = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    difference = (codes.double() - expected_codes).abs()
    assert (difference <= near_half.double()).all()

    y = fake_quantize(x, spec, clip)
    assert y.dtype == dtype
    same = difference == 0
    expected = reference.dequantize(expected_codes, expected_scale, expected_offset)
    bound = tolerance * max(expected.abs().max().item(), x.double().abs().max().item())
    torch.testing.assert_close(y.double()[same], expected[same], rtol=0, atol=bound)


@every_bits
@both_symmetries
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@properties(5)
@given(data=st.data(), scale_dtype=st.sampled_from(SCALE_DTYPES))
def test_fake_quantize_is_dequantized_codes_bit_for_bit(bits, symmetric, dtype, data, scale_dtype):
    x, group_size = data.draw(grouped_values(dtype))
    spec = QuantSpec(bits, symmetric, group_size=group_size)
    clip = clips_for(x.float(), group_size, seed=1)
    codes, scale, offset = quantize(x, spec, clip, scale_dtype)
    assert codes.min() >= spec.qmin
    assert codes.max() <= spec.qmax
    assert torch.equal(fake_quantize(x, spec, clip, scale_dtype), dequantize(codes, scale, offset).to(dtype))


@every_bits
@both_symmetries
@properties(10)
@given(values=grouped_values(), seed=st.integers(0, 2**31))
def test_error_is_at_most_half_a_step_unless_clipped(bits, symmetric, values, seed):
    x, group_size = values
    spec = QuantSpec(bits, symmetric, group_size=group_size)
    clip = clips_for(x, group_size, seed)
    _, scale, offset = quantize(x, spec, clip)
    steps = steps_of(x, spec, scale, offset)
    scale_I = scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
    y = fake_quantize(x, spec, clip)
    within = (steps >= spec.qmin - 0.5) & (steps <= spec.qmax + 0.5)
    slack = 1e-12 * x.abs().max()
    assert ((y - x).abs()[within] <= scale_I[within] / 2 + slack).all()

    # What is clipped lands on the nearest end of the grid.
    offset_I = 0 if offset is None else offset.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
    lowest, highest = spec.qmin * scale_I + offset_I, spec.qmax * scale_I + offset_I
    torch.testing.assert_close(y[~within], x.clamp(lowest, highest)[~within], rtol=1e-12, atol=0)

    # With clip = 1 nothing is clipped at all.
    unclipped_scale = quantize(x, spec)[1].repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
    assert ((fake_quantize(x, spec) - x).abs() <= unclipped_scale / 2 + slack).all()


@every_bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@properties(5)
@given(data=st.data())
def test_symmetric_is_idempotent_without_clip(bits, dtype, data):
    """The largest value lies on the grid, so a second pass finds the same scale and nothing left to round."""
    x, group_size = data.draw(grouped_values(dtype))
    spec = QuantSpec(bits, group_size=group_size)
    once = fake_quantize(x, spec)
    assert torch.equal(quantize(once, spec)[0], quantize(x, spec)[0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 0
    close(fake_quantize(once, spec), once, tolerance)


@every_bits
@properties(10)
@given(values=grouped_values())
def test_asymmetric_is_idempotent_without_clip(bits, values):
    x, group_size = values
    spec = QuantSpec(bits, symmetric=False, group_size=group_size)
    once = fake_quantize(x, spec)
    assert torch.equal(quantize(once, spec)[0], quantize(x, spec)[0])
    close(fake_quantize(once, spec), once, 1e-12)


@every_bits
def test_clipped_values_stay_when_the_scale_stays(bits):
    """With c < 1 the second pass would clip again; with the clip taken back out of it, it changes nothing."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    x[:, 0] = 5  # so that the largest magnitude is positive and is clipped to qmax, the number that sets the scale
    once = fake_quantize(x, QuantSpec(bits), torch.tensor([0.6], dtype=torch.float64))
    reach = once.abs().amax(-1, keepdim=True)
    clip = 5 * 0.6 / reach
    close(fake_quantize(once, QuantSpec(bits), clip), once, 1e-12)


@both_symmetries
@properties(15)
@given(values=grouped_values(torch.float32), bits=st.integers(2, 8))
def test_powers_of_two_scale_through_exactly(symmetric, values, bits):
    x, group_size = values
    spec = QuantSpec(bits, symmetric, group_size=group_size)
    clip = clips_for(x, group_size, seed=2)
    assert torch.equal(fake_quantize(x * 4, spec, clip), fake_quantize(x, spec, clip) * 4)


@both_symmetries
@properties(15)
@given(values=grouped_values(torch.float32), bits=st.integers(2, 8))
def test_groups_and_rows_know_nothing_of_each_other(symmetric, values, bits):
    x, group_size = values
    grouped, alone = QuantSpec(bits, symmetric, group_size=group_size), QuantSpec(bits, symmetric)
    clip = clips_for(x, group_size, seed=3)
    y = fake_quantize(x, grouped, clip)
    for row in reference.rows_of(x):
        for g, group in enumerate(reference.group_slices(x.shape[-1], group_size)):
            assert torch.equal(y[row][group], fake_quantize(x[row][group], alone, clip[row][g : g + 1]))


def test_rounds_half_to_even():
    x = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49])
    codes, scale, _ = quantize(x, QuantSpec(4))
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [7, 0, 2, 2, 0, -2, -2, 3]


def test_clip_uses_the_code_below_minus_qmax():
    """Eq. 2 clamps to [-2^(N-1), 2^(N-1)-1]: the negative side has one code more, reached only with a clip."""
    x = torch.tensor([-7.0, 7.0, 1.0, 0.0])
    codes, scale, _ = quantize(x, QuantSpec(4), torch.tensor([0.5]))
    assert scale.tolist() == [0.5]
    assert codes.tolist() == [-8, 7, 2, 0]


def test_asymmetric_offset_is_the_minimum():
    x = torch.tensor([-3.0, 12.0, 0.0, 1.4])
    codes, scale, offset = quantize(x, QuantSpec(4, symmetric=False))
    assert (scale.tolist(), offset.tolist()) == ([1.0], [-3.0])
    assert codes.tolist() == [0, 15, 3, 4]


@both_symmetries
def test_computes_in_float32_at_least(symmetric):
    """A bf16 tensor gives what its float32 copy gives, rounded once at the end."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = QuantSpec(8, symmetric, group_size=16)
    clip = clips_for(x.float(), 16, seed=4)
    assert torch.equal(fake_quantize(x, spec, clip), fake_quantize(x.float(), spec, clip).bfloat16())
    assert torch.equal(quantize(x, spec, clip)[0], quantize(x.float(), spec, clip)[0])


def test_no_rows_give_no_values():
    for symmetric in (True, False):
        y = fake_quantize(torch.zeros(0, 16), QuantSpec(4, symmetric, group_size=8))
        assert y.tolist() == []


# --- stored scales ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SCALE_DTYPES[1:])
@properties(60)
@given(number=st.floats(-(2.0**15), 2.0**15, width=32))
def test_as_stored_is_the_nearest_number_of_the_format(dtype, number):
    x = torch.tensor([number], requires_grad=True)
    stored = as_stored(x, dtype)
    assert stored.dtype == torch.float32
    assert stored.item() == reference.round_to_format(number, dtype)
    assert torch.autograd.grad(stored.sum(), x)[0].item() == 1


def test_as_stored_without_a_format_is_the_tensor_itself():
    x = torch.randn(3)
    assert as_stored(x, None) is x


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES[1:])
@properties(60)
@given(scale=st.floats(2.0**-30, 2.0**14, width=32))
def test_storable_rounds_to_nearest_and_is_what_the_format_holds(scale_dtype, scale):
    stored = storable(torch.tensor([scale]), scale_dtype)
    assert torch.equal(stored.to(scale_dtype).float(), stored)
    assert stored.item() == max(reference.round_to_format(scale, scale_dtype), reference.SMALLEST_SCALE)


@both_symmetries
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES[1:])
@pytest.mark.parametrize("magnitude", [0.0, 1e-9, 3e-7, 1.0, 1e4])
def test_saved_codes_and_scales_give_what_was_trained(symmetric, scale_dtype, magnitude):
    """The contract with the artifact: going through the storage dtype loses nothing, however small the values are."""
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * magnitude
    spec = QuantSpec(4, symmetric, group_size=8)
    clip = clips_for(x, 8, seed=5)
    codes, scale, offset = quantize(x, spec, clip, scale_dtype)
    loaded = dequantize(codes.to(torch.int8), scale.to(scale_dtype), offset)
    assert torch.equal(loaded, fake_quantize(x, spec, clip, scale_dtype))


def test_rounding_the_scale_changes_the_values_but_not_the_gradient_of_the_scale():
    scale = torch.tensor([0.123456789, 3.0], requires_grad=True)
    stored = storable(scale, torch.bfloat16)
    assert stored.tolist() == [reference.round_to_format(scale[0].item(), torch.bfloat16), 3.0]
    assert stored[0] != scale[0]
    assert torch.autograd.grad(stored.sum(), scale)[0].tolist() == [1.0, 1.0]


def test_large_values_survive_float16_scales():
    x = torch.tensor([1e6, 1.0, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert fake_quantize(x, QuantSpec(4), scale_dtype=torch.float16).isfinite().all()


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(function, x, clip, upstream, *options):
    """Gradients of Σ upstream · function(x, …, clip, …) for x and clip."""
    x, clip = x.detach().clone().requires_grad_(), clip.detach().clone().requires_grad_()
    (function(x, clip, *options) * upstream).sum().backward()
    return x.grad, clip.grad


def assert_gradients_match(x, group_size, bits, symmetric, clip, scale_dtype, upstream, tolerance):
    spec = QuantSpec(bits, symmetric, group_size=group_size)
    actual = gradients(lambda x, clip: fake_quantize(x, spec, clip, scale_dtype), x, clip, upstream)
    expected = gradients(
        lambda x, clip: reference.fake_quantize(x, bits, symmetric, group_size, clip, scale_dtype),
        x.double(),
        clip.double(),
        upstream.double(),
    )
    for got, wanted in zip(actual, expected, strict=True):
        close(got, wanted, tolerance)


@every_bits
@both_symmetries
@properties(8)
@given(values=grouped_values(), scale_dtype=st.sampled_from(SCALE_DTYPES), seed=st.integers(0, 2**31))
def test_gradients_equal_autograds_own_composition(bits, symmetric, values, scale_dtype, seed):
    """Gradients of x, also through the maximum (and minimum) that sets the scale, and of the clip values."""
    x, group_size = values
    clip = clips_for(x, group_size, seed)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_gradients_match(x, group_size, bits, symmetric, clip, scale_dtype, upstream, 1e-12)


@both_symmetries
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-6)])
def test_gradients_in_narrow_dtypes(bits, symmetric, dtype, tolerance):
    generator = torch.Generator().manual_seed(bits)
    x, upstream = (torch.randn(4, 48, generator=generator).to(dtype) for _ in range(2))
    clip = clips_for(x.float(), 16, seed=6)
    assert_gradients_match(x, 16, bits, symmetric, clip, None, upstream, tolerance)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1), (4, 3), (4, 1)])
def test_gradient_of_a_shared_clip_is_summed_over_its_sharers(shape):
    """Every granularity of weights ([O, G], [1, G], [1, 1]) and of activations ([G])."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(4, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    clip = torch.rand(shape, generator=generator, dtype=torch.float64) / 2 + 0.5
    assert_gradients_match(x, 8, 4, True, clip, None, upstream, 1e-12)


@both_symmetries
def test_the_first_of_tied_maxima_takes_the_gradient(symmetric):
    """As torch.max has it where it is asked for the place."""
    x = torch.tensor([[3.0, -3.0, 3.0, 1.1, -0.4, 0.0, -3.0, 2.2]], dtype=torch.float64)
    clip = torch.tensor([[0.8]], dtype=torch.float64)
    upstream = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 8)
    spec = QuantSpec(3, symmetric)
    got, _ = gradients(lambda x, clip: fake_quantize(x, spec, clip), x, clip, upstream)
    # A breath more at the first largest (and, without symmetry, at the first smallest) changes no code: the gradient is
    # then that of the composition, whose maxima are not tied.
    apart = x.clone()
    apart[0, 0] += 1e-9
    apart[0, 1] -= 0.0 if symmetric else 1e-9
    wanted, _ = gradients(lambda x, clip: fake_quantize(x, spec, clip), apart, clip, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert_gradients_match(apart, None, 3, symmetric, clip, None, upstream, 1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@both_symmetries
def test_gradients_equal_finite_differences_of_the_frozen_rounding(bits, symmetric):
    """With its rounding decisions frozen the function is smooth, and measured slopes must be the gradient."""
    generator = torch.Generator().manual_seed(bits)
    x, upstream = (torch.randn(2, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    clip = torch.rand(2, 2, generator=generator, dtype=torch.float64) / 2 + 0.4
    spec = QuantSpec(bits, symmetric, group_size=8)

    def frozen(x_now, clip_now):
        y = reference.frozen_fake_quantize(x_now, clip_now, (x, clip), bits, symmetric, 8)
        return (y * upstream).sum().item()

    def slopes(at, evaluate):
        slope, width = torch.zeros_like(at), 1e-6
        for place in reference.rows_of(at.unsqueeze(-1)):
            step = torch.zeros_like(at)
            step[place] = width
            slope[place] = (evaluate(at + step) - evaluate(at - step)) / (2 * width)
        return slope

    x_gradient, clip_gradient = gradients(lambda x, clip: fake_quantize(x, spec, clip), x, clip, upstream)
    close(x_gradient, slopes(x, lambda moved: frozen(moved, clip)), 1e-7)
    close(clip_gradient, slopes(clip, lambda moved: frozen(x, moved)), 1e-7)


@every_bits
@both_symmetries
def test_where_all_is_clipped_the_clip_gradient_is_the_true_slope(bits, symmetric):
    """A clipped value is its end of the grid times Δ: no rounding is left, so the function itself can be measured."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    clip = torch.full((3, 1), 0.3, dtype=torch.float64, requires_grad=True)
    spec = QuantSpec(bits, symmetric)
    _, scale, offset = quantize(x, spec, clip.detach())
    steps = steps_of(x, spec, scale, offset)
    clipped = ((steps < spec.qmin - 0.6) | (steps > spec.qmax + 0.6)).double()
    assert clipped.sum() >= 3
    (slope,) = torch.autograd.grad((fake_quantize(x, spec, clip) * clipped).sum(), clip)
    with torch.no_grad():
        above, below = (fake_quantize(x, spec, clip + step) * clipped for step in (1e-6, -1e-6))
    close(slope, (above - below).sum(-1, keepdim=True) / 2e-6, 1e-8)


def test_gradient_flows_where_only_one_of_x_and_clip_wants_it():
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clip = torch.tensor([0.7], dtype=torch.float64)
    both = gradients(lambda x, clip: fake_quantize(x, QuantSpec(3), clip), x, clip, 1.0)
    x_only, clip_only = x.clone().requires_grad_(), clip.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(fake_quantize(x_only, QuantSpec(3), clip).sum(), x_only)[0], both[0])
    assert torch.equal(torch.autograd.grad(fake_quantize(x, QuantSpec(3), clip_only).sum(), clip_only)[0], both[1])


# --- degenerate rows --------------------------------------------------------------------------------------------------


@both_symmetries
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_zero_and_their_gradients_finite(symmetric, scale_dtype, dtype):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, 8:] = 0, 0
    spec = QuantSpec(4, symmetric, group_size=8)
    clip = torch.full((3, 2), 0.9)
    y = fake_quantize(x, spec, clip, scale_dtype)
    assert y.isfinite().all()
    assert y[1].eq(0).all()
    assert y[2, 8:].eq(0).all()
    x_gradient, clip_gradient = gradients(lambda x, clip: fake_quantize(x, spec, clip, scale_dtype), x, clip, 1.0)
    assert x_gradient.isfinite().all()
    assert x_gradient[1].eq(1).all()  # not clipped: straight through
    assert clip_gradient[0].ne(0).all()
    assert clip_gradient[1].eq(0).all()
    assert clip_gradient[2, 1] == 0


@both_symmetries
def test_tiny_rows_move_no_scale(symmetric):
    """Below MIN_SCALE the scale is a constant: x has its straight-through gradient, the clip value none."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x.clamp(-2, 2) * 1e-7
    spec, clip = QuantSpec(4, symmetric), torch.full((3, 1), 0.9, dtype=torch.float64)
    assert quantize(x, spec, clip)[0].ne(0).any()
    assert_gradients_match(x, None, 4, symmetric, clip, None, upstream, 1e-12)
    _, clip_gradient = gradients(lambda x, clip: fake_quantize(x, spec, clip), x, clip, upstream)
    assert clip_gradient.eq(0).all()


@every_bits
def test_constant_rows_are_exact_when_asymmetric(bits):
    x = torch.tensor([[0.3], [-2.0], [1e4]]).expand(3, 8).contiguous().requires_grad_()
    y = fake_quantize(x, QuantSpec(bits, symmetric=False))
    assert torch.equal(y, x)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_a_vanishing_clip_never_makes_the_scale_zero():
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for clip in (0.0, -1.0, 1e-20):
        scale, _ = scale_and_offset(to_groups(x, QuantSpec(4)), QuantSpec(4), torch.tensor([clip]))
        assert scale.flatten().tolist() == [MIN_SCALE] * 2
        assert fake_quantize(x, QuantSpec(4), torch.tensor([clip])).isfinite().all()
