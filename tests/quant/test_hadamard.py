import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisup_lightning.quant import hadamard
from bisup_lightning.quant.hadamard import (
    MAX_ORDER,
    apply_hadamard,
    hadamard_factors,
    hadamard_matrix,
    hadamard_orders,
    is_known_order,
    random_hadamard_matrix,
    random_signs,
)

# heads, head sizes, hidden and intermediate sizes of Llama and Qwen models, and how each is split
SIZES = {
    1: (1,),
    2: (2,),
    6: (3, 2),
    12: (12,),
    14: (7, 2),
    28: (28,),
    40: (40,),
    64: (64,),
    128: (128,),
    576: (24, 24),
    768: (24, 32),
    896: (28, 32),
    1024: (32, 32),
    2816: (44, 64),
    4864: (76, 64),
    5120: (80, 64),
    8960: (80, 112),
    9728: (76, 128),
    11008: (172, 64),
    13696: (107, 128),
    13824: (108, 128),
    14336: (112, 128),
    17920: (140, 128),
    18944: (148, 128),
    27392: (107, 256),
    28672: (224, 128),
    29568: (168, 176),
    53248: (208, 256),
}
FALL_BACKS = {6: 3, 14: 7, 13696: 107, 27392: 107}
sizes = st.one_of(st.integers(1, 600), st.integers(1, 150).map(lambda quarter: 4 * quarter))


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entries(n, rows, columns):
    """H[rows, columns] entry by entry from the definition of a Kronecker product, without building it."""
    h = torch.ones(len(rows), len(columns), dtype=torch.float64)
    for factor in reversed(hadamard_factors(n)):
        h *= factor[(rows % len(factor))[:, None], columns % len(factor)] / len(factor) ** 0.5
        rows, columns = rows // len(factor), columns // len(factor)
    return h


@pytest.mark.parametrize("order", [k for k in range(1, MAX_ORDER + 1) if is_known_order(k)])
def test_every_known_order_is_a_hadamard_matrix(order):
    (factor,) = hadamard_factors(order)
    assert torch.equal(factor.abs(), torch.ones(order, order).double())
    assert torch.equal(factor @ factor.T, order * torch.eye(order).double())  # small integers: no rounding


@pytest.mark.parametrize("order", [3, 5, 7, 9, 15, 107, 331])
def test_the_fall_back_is_orthogonal_symmetric_and_nearly_flat(order):
    (factor,) = hadamard_factors(order)
    torch.testing.assert_close(factor @ factor, order * torch.eye(order).double(), rtol=0, atol=order * 1e-13)
    torch.testing.assert_close(factor, factor.T, rtol=0, atol=0)
    assert factor.abs().max() <= 2**0.5


@pytest.mark.parametrize(("n", "orders"), SIZES.items())
def test_sizes_of_real_models_split_into_hadamard_orders(n, orders):
    assert hadamard_orders(n) == orders
    assert [order for order in orders if not is_known_order(order)] == ([FALL_BACKS[n]] if n in FALL_BACKS else [])


@pytest.mark.parametrize("n", SIZES)
def test_sizes_of_real_models_are_orthogonal_and_equal_their_definition(n):
    x_TN, factors = noise(3, n), hadamard_factors(n)
    y_TN = apply_hadamard(x_TN, factors)
    columns = torch.arange(0, n, n // 61 + 1)
    expected = x_TN @ entries(n, torch.arange(n), columns)
    torch.testing.assert_close(y_TN[:, columns], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(y_TN @ y_TN.T, x_TN @ x_TN.T, rtol=1e-12, atol=1e-10)  # angles and lengths
    torch.testing.assert_close(apply_hadamard(y_TN, factors, transpose=True), x_TN, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_there_and_back_in_float32(n):
    x_TN, factors = noise(2, 3, n, dtype=torch.float32), hadamard_factors(n)
    y_TN = apply_hadamard(x_TN, factors)
    assert y_TN.shape == x_TN.shape
    assert y_TN.dtype == x_TN.dtype
    torch.testing.assert_close(y_TN.norm(dim=-1), x_TN.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(apply_hadamard(y_TN, factors, transpose=True), x_TN, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_an_outlier_is_spread_over_all_channels(n):
    one_hot_N = torch.zeros(n, dtype=torch.float64)
    one_hot_N[n // 3] = 1
    size_N = apply_hadamard(one_hot_N, hadamard_factors(n)).abs() * n**0.5
    if n in FALL_BACKS:
        assert size_N.max() <= 2**0.5
    else:
        torch.testing.assert_close(size_N, torch.ones_like(size_N), rtol=1e-14, atol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=sizes, seed=st.integers(0, 2**31))
def test_any_size_equals_its_dense_matrix(n, seed):
    h_NN, x_TN = hadamard_matrix(n), noise(4, n, seed=seed)
    torch.testing.assert_close(h_NN @ h_NN.T, torch.eye(n).double(), rtol=0, atol=1e-12)
    if all(map(is_known_order, hadamard_orders(n))):
        torch.testing.assert_close(h_NN.abs(), torch.full_like(h_NN, n**-0.5), rtol=1e-15, atol=0)
    factors = hadamard_factors(n)
    torch.testing.assert_close(apply_hadamard(x_TN, factors), x_TN @ h_NN, rtol=0, atol=1e-12)
    torch.testing.assert_close(apply_hadamard(x_TN, factors, transpose=True), x_TN @ h_NN.T, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=st.integers(1, 100_000))
def test_no_split_leaves_a_smaller_fall_back(n):
    orders = hadamard_orders(n)
    rest = orders[0] if not is_known_order(orders[0]) else 1
    assert torch.tensor(orders).prod() == n
    assert rest % 2 == 1
    assert all(is_known_order(order) for order in orders[rest > 1 :])
    for smaller in (k for k in range(1, rest) if n % k == 0 and k % 2):
        assert not is_product_of_known_orders(n // smaller)


def is_product_of_known_orders(n):
    return n == 1 or any(
        n % k == 0 and is_known_order(k) and is_product_of_known_orders(n // k) for k in range(2, MAX_ORDER + 1)
    )


@pytest.mark.parametrize("n", [2, 64, 512])
def test_a_power_of_two_is_the_walsh_hadamard_matrix(n):
    index = torch.arange(n)
    ones = sum((index[:, None] & index) >> bit & 1 for bit in range(n.bit_length()))
    torch.testing.assert_close(hadamard_matrix(n) * n**0.5, 1.0 - 2 * (ones % 2).double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("heads", "size"), [(6, 64), (14, 64), (28, 128), (40, 128), (32, 1)])
@pytest.mark.parametrize("transpose", [False, True])
def test_across_heads_equals_the_transform_of_the_moved_dimension(heads, size, transpose):
    x_THD, factors = noise(2, 5, heads, size), hadamard_factors(heads)
    moved = apply_hadamard(x_THD.transpose(-1, -2).contiguous(), factors, transpose=transpose).transpose(-1, -2)
    torch.testing.assert_close(apply_hadamard(x_THD, factors, transpose=transpose, dim=-2), moved)


@pytest.mark.parametrize("n", [6, 28, 768, 29568])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_gradient_is_the_transposed_transform(n, transpose):
    x_TN, grad_TN, factors = noise(3, n).requires_grad_(), noise(3, n, seed=1), hadamard_factors(n)
    apply_hadamard(x_TN, factors, transpose=transpose).backward(grad_TN)
    torch.testing.assert_close(x_TN.grad, apply_hadamard(grad_TN, factors, transpose=not transpose))


@pytest.mark.parametrize("n", [14, 4864, 13696, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_lose_no_more_than_a_few_roundings(n, dtype):
    x_TN, factors = 100 * noise(4, n).to(dtype), hadamard_factors(n)
    x_TN[:, 1] = 5000  # a massive activation
    exact = apply_hadamard(x_TN.double(), factors)
    error = (apply_hadamard(x_TN, factors).double() - exact).norm() / exact.norm()
    assert error < torch.finfo(dtype).eps


def test_weights_and_activations_rotated_alike_leave_the_product():
    x_TI, w_OI, factors = noise(5, 768), noise(7, 768, seed=1), hadamard_factors(768)
    torch.testing.assert_close(apply_hadamard(x_TI, factors) @ apply_hadamard(w_OI, factors).T, x_TI @ w_OI.T)


def test_random_rotation_is_orthogonal_seeded_and_equals_signs_then_transform():
    q_NN = random_hadamard_matrix(896, seed=3)
    torch.testing.assert_close(q_NN @ q_NN.T, torch.eye(896).double(), rtol=0, atol=1e-12)
    assert torch.equal(q_NN, random_hadamard_matrix(896, seed=3))
    assert not torch.equal(q_NN, random_hadamard_matrix(896, seed=4))
    x_TN, signs_N = noise(3, 896), random_signs(896, seed=3)
    assert set(signs_N.tolist()) == {-1.0, 1.0}
    rotated = apply_hadamard(x_TN * signs_N, hadamard_factors(896))
    torch.testing.assert_close(rotated, x_TN @ q_NN)


def test_factors_are_the_callers_own():
    hadamard_factors(12, torch.int8)[0].zero_()
    hadamard_factors(3)[0].zero_()
    assert hadamard_factors(12)[0].all()
    assert hadamard_factors(3)[0].all()


def test_a_default_device_leaves_no_trace_in_the_cache():
    hadamard._factor.cache_clear()
    with torch.device("meta"):  # as transformers builds a model
        assert {factor.device.type for n in (6, 64, 28) for factor in hadamard_factors(n)} == {"cpu"}
        assert random_hadamard_matrix(14, seed=0).device.type == "cpu"
    assert [hadamard_factors(n)[0].device.type for n in (6, 64, 28)] == ["cpu"] * 3


def test_compiles_to_one_graph():
    x_TN, factors = noise(4, 768, dtype=torch.float32), hadamard_factors(768)
    compiled = torch.compile(apply_hadamard, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x_TN, factors), apply_hadamard(x_TN, factors))


def test_an_empty_batch_stays_empty():
    assert apply_hadamard(torch.zeros(0, 768), hadamard_factors(768)).shape == (0, 768)


def test_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="positive size"):
        hadamard_factors(0)
    with pytest.raises(ValueError, match="do not make up a size of 24"):
        apply_hadamard(torch.zeros(2, 24), hadamard_factors(48))


def test_a_missing_table_is_named(monkeypatch):
    monkeypatch.setattr(hadamard, "find_spec", lambda name: None)
    hadamard._factor.cache_clear()
    assert len(hadamard_factors(14336 // 112)) == 1
    with pytest.raises(ImportError, match="order 112 is part of compressed-tensors"):
        hadamard_factors(14336)
