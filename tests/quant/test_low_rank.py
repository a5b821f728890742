import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisup_lightning.quant.low_rank import lrec, slrec, start
from tests import reference

both_forms = pytest.mark.parametrize(("form", "slow"), [(slrec, reference.slrec), (lrec, reference.lrec)])
shapes = {"rows": st.integers(1, 6), "features": st.integers(1, 6), "rank": st.integers(1, 4)}


def problem(rows, features, rank, seed, dtype=torch.float64):
    """W, A and B, all random."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, features), (rows, rank), (rank, features))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


@both_forms
@settings(max_examples=15, deadline=None, derandomize=True)
@given(**shapes, seed=st.integers(0, 2**31))
def test_float64_equals_the_formula(form, slow, rows, features, rank, seed):
    w, a, b = problem(rows, features, rank, seed)
    torch.testing.assert_close(form(w, a, b), slow(w, a, b), rtol=1e-12, atol=1e-12)


@both_forms
def test_float32_equals_the_formula(form, slow):
    w, a, b = problem(6, 9, 4, seed=0, dtype=torch.float32)
    y = form(w, a, b)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), slow(w.double(), a.double(), b.double()), rtol=1e-6, atol=1e-5)


@both_forms
@settings(max_examples=10, deadline=None, derandomize=True)
@given(**shapes, seed=st.integers(0, 2**31))
def test_gradients_equal_autograds_own_composition(form, slow, rows, features, rank, seed):
    upstream = problem(rows, features, rank, seed + 1)[0]
    gradients = []
    for function in (form, slow):
        tensors = [tensor.requires_grad_() for tensor in problem(rows, features, rank, seed)]
        gradients.append(torch.autograd.grad((function(*tensors) * upstream).sum(), tensors))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [slrec, lrec])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_changes_nothing_at_the_start(form, dtype):
    w = problem(12, 20, 4, seed=0)[0].to(dtype)
    a, b = start(12, 20, 4, torch.Generator().manual_seed(1))
    y = form(w, a, b)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(y, w.to(y.dtype))


@pytest.mark.parametrize("form", [slrec, lrec])
def test_the_start_can_be_left(form):
    """AB = 0 because B is zero; A is not, so B has a gradient and the first step makes AB nonzero."""
    w = problem(12, 20, 4, seed=0, dtype=torch.float32)[0]
    a, b = (tensor.requires_grad_() for tensor in start(12, 20, 4, torch.Generator().manual_seed(1)))
    a_gradient, b_gradient = torch.autograd.grad(form(w, a, b).square().sum(), (a, b))
    assert a_gradient.eq(0).all()
    assert b_gradient.ne(0).all()


def test_start_is_drawn_from_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = (start(64, 8, 16, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank", [4, 32, 128])
def test_start_keeps_the_size_of_a_product(rank):
    """A's spread falls with the rank like a linear layer's, so that B's learning rate means the same at any rank."""
    a, _ = start(2000, 4, rank, torch.Generator().manual_seed(0))
    assert abs(a.mean()) < 0.02
    assert a.square().sum(-1).mean().item() == pytest.approx(1, rel=0.05)


def test_slrec_is_anchored_by_the_weight_and_lrec_is_not():
    w, a, b = problem(6, 6, 3, seed=0)
    w[2, 3] = 0
    assert slrec(w, a, b)[2, 3] == 0
    assert lrec(w, a, b)[2, 3] != 0
    torch.testing.assert_close(slrec(3 * w, a, b), 3 * slrec(w, a, b), rtol=1e-12, atol=0)
    torch.testing.assert_close(lrec(w + 3, a, b), lrec(w, a, b) + 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_narrow_only_the_factors(dtype):
    """A and B enter in W's dtype, like the factors of the forward pass's other products; the rest is float32."""
    w, a, b = problem(8, 16, 4, seed=0, dtype=torch.float32)
    w = w.to(dtype)
    ab = reference.product(a.to(dtype).double(), b.to(dtype).double())
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(slrec(w, a, b).double(), w.double() * (1 + ab), **near)
    torch.testing.assert_close(lrec(w, a, b).double(), w.double() + ab, **near)


@both_forms
def test_gradients_reach_float32_factors_of_a_narrow_weight(form, slow):
    w, a, b = problem(8, 16, 4, seed=0, dtype=torch.float32)
    upstream = problem(8, 16, 4, seed=1)[0]
    narrow, factors = w.bfloat16(), (a.requires_grad_(), b.requires_grad_())
    got = torch.autograd.grad((form(narrow, *factors) * upstream).sum(), factors)
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    wanted = torch.autograd.grad((slow(narrow.double(), *exact) * upstream).sum(), exact)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=0.02 * theirs.abs().max().item())
