import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisup_lightning.quant.affine import fake_quantize, to_groups
from bisup_lightning.quant.clipping import CLIP_GRID, search_weight_clip
from bisup_lightning.quant.spec import QuantSpec
from tests import reference

every_granularity = pytest.mark.parametrize("granularity", ["row", "group", "tensor"])
GRID = [1 - k / 50 for k in range(36)]


def weight(rows, features, seed, dtype=torch.float64, outliers=0):
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    for _ in range(outliers):
        o, i = (int(torch.randint(n, (), generator=generator)) for n in (rows, features))
        w_OI[o, i] *= 6
    return w_OI.to(dtype)


def squared_error(w_OI, spec, clip, scale_dtype=None):
    """Squared rounding error of what shares each clip value, in float64."""
    y_OI = fake_quantize(w_OI, spec, clip, scale_dtype)
    error_OG = to_groups((y_OI.double() - w_OI.double()) ** 2, spec).sum(-1)
    shared = {"row": (), "group": (0,), "tensor": (0, 1)}[spec.granularity]
    return error_OG.sum(shared, keepdim=True) if shared else error_OG


def test_the_grid_goes_from_one_down_to_three_tenths():
    torch.testing.assert_close(torch.tensor(CLIP_GRID), torch.tensor(GRID), rtol=1e-7, atol=0)
    assert CLIP_GRID[0] == 1
    assert min(CLIP_GRID) > 0.29


@every_granularity
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 8]),
    scale_dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_equals_brute_force(granularity, symmetric, bits, group_size, scale_dtype, seed):
    w_OI = weight(3, 16, seed, outliers=seed % 3)
    spec = QuantSpec(bits, symmetric, granularity, group_size)
    expected = reference.search_clip(w_OI, GRID, granularity, bits, symmetric, group_size, scale_dtype)
    clip = search_weight_clip(w_OI, spec, scale_dtype)
    assert clip.dtype == torch.float32
    assert clip.shape == spec.clip_shape(3, 16)
    torch.testing.assert_close(clip, expected.float(), rtol=1e-6, atol=0)


@every_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_clip_of_the_grid_does_better(granularity, dtype, scale_dtype, bits):
    """Judged by what the weight then becomes, so rounding of the scale included; clip = 1 is in the grid."""
    w_OI = weight(6, 64, seed=bits, dtype=dtype, outliers=4)
    spec = QuantSpec(bits, granularity=granularity, group_size=16)
    found = squared_error(w_OI.float(), spec, search_weight_clip(w_OI, spec, scale_dtype), scale_dtype)
    for clip in CLIP_GRID:
        assert (found <= squared_error(w_OI.float(), spec, torch.tensor([[clip]]), scale_dtype) * (1 + 1e-5)).all()


@every_granularity
@settings(max_examples=20, deadline=None, derandomize=True)
@given(bits=st.integers(2, 8), magnitude=st.integers(-4, 3), seed=st.integers(0, 2**31))
def test_never_worse_than_no_clip(granularity, bits, magnitude, seed):
    w_OI = weight(4, 32, seed, torch.float32, outliers=seed % 4) * 10.0**magnitude
    spec = QuantSpec(bits, granularity=granularity, group_size=8)
    found = squared_error(w_OI, spec, search_weight_clip(w_OI, spec))
    assert (found <= squared_error(w_OI, spec, None) * (1 + 1e-5)).all()


def test_finer_sharing_is_never_worse():
    w_OI = weight(8, 64, seed=0, outliers=6)
    errors = []
    for granularity in ("row", "group", "tensor"):
        spec = QuantSpec(3, granularity=granularity, group_size=16)
        errors.append(squared_error(w_OI, spec, search_weight_clip(w_OI, spec)).sum().item())
    assert errors[0] < errors[1] < errors[2]


def test_one_outlier_is_clipped_and_other_rows_are_not():
    """The outlier's own error must be outweighed by the many it makes room for: a hand-made case."""
    on_grid = torch.arange(-7.0, 8.0).repeat(2, 20)  # codes of 4 bits: clip = 1 is exact
    on_grid[1] = weight(1, 300, seed=0)[0].clamp(-2, 2)
    on_grid[1, 0] = 4.0
    clip = search_weight_clip(on_grid, QuantSpec(4))
    assert clip[0] == 1
    assert 0.3 < clip[1] < 0.8


def test_honours_the_scales_dtype():
    """Many bits and coarse bf16 scales: searching with exact scales gives other clips, worse once they are stored."""
    w_OI = weight(32, 64, seed=0, dtype=torch.float32)
    spec = QuantSpec(7, group_size=16)
    aware, unaware = search_weight_clip(w_OI, spec, torch.bfloat16), search_weight_clip(w_OI, spec)
    assert (aware != unaware).any()
    aware_error, unaware_error = (squared_error(w_OI, spec, clip, torch.bfloat16) for clip in (aware, unaware))
    assert (aware_error <= unaware_error * (1 + 1e-5)).all()
    assert aware_error.sum() < 0.996 * unaware_error.sum()


def test_rows_of_zeros_keep_clip_one():
    w_OI = weight(3, 16, seed=0, dtype=torch.float32)
    w_OI[1] = 0
    for scale_dtype in (None, torch.bfloat16, torch.float16):
        clip = search_weight_clip(w_OI, QuantSpec(4), scale_dtype)
        assert clip.isfinite().all()
        assert clip[1] == 1


def test_leaves_its_argument_alone_and_builds_no_graph():
    w_OI = weight(3, 16, seed=0, dtype=torch.float32).requires_grad_()
    before, kept_for_backward = w_OI.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(kept_for_backward.append, lambda tensor: tensor):
        clip = search_weight_clip(w_OI, QuantSpec(4))
    assert not clip.requires_grad
    assert not kept_for_backward
    assert torch.equal(w_OI.detach(), before)


def test_refuses_groups_that_do_not_divide_the_row():
    with pytest.raises(ValueError, match="group_size 16 does not divide 24 features"):
        search_weight_clip(torch.zeros(2, 24), QuantSpec(4, group_size=16))
