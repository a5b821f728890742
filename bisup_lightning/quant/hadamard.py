"""Orthogonal transforms of any size that spread outliers (QuaRot, arXiv 2404.00456), as products of small matrices.

The transform of size n is H = (F_1 ⊗ … ⊗ F_k)/√n on row vectors, x ↦ x·H, with F·Fᵀ = f·I for each factor of order f:

- f a power of two: Sylvester's matrix, so that H is the Walsh–Hadamard matrix where n is one;
- any other multiple of four up to 256: a Hadamard matrix from Sloane's library, which compressed-tensors ships as data;
- what is left of n, an odd number as small as can be: the Hartley matrix cos(2πij/f) + sin(2πij/f).

The last is the fall-back: orthogonal for every order, entries at most √2 where a Hadamard matrix has ±1 (a random
orthogonal matrix of order 107 has some beyond 3), and no random numbers. 6 = 3·2 and 13696 = 107·128 need it.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MAX_ORDER = 256  # of a Hadamard factor: the tables end here, and a product this small is bound by memory (bf16, H100)


def is_known_order(n: int) -> bool:
    """Whether a Hadamard matrix of order n is at hand as one factor: 1, 2 and the multiples of four to `MAX_ORDER`."""
    return n in (1, 2) or (n % 4 == 0 and 4 <= n <= MAX_ORDER)


@cache
def hadamard_orders(n: int) -> tuple[int, ...]:
    """Orders of the factors of size n: first the odd fall-back, if there is one, then Hadamard orders.

    The fall-back is as small as it can be, then factors are few (each costs a pass over the data), then their sum, the
    multiplications for an element, is least: 14336 = 112·128, 29568 = 168·176, 27392 = 107·256. The order with the most
    twos stands last, where it aligns the rows of what lies between two products.

    Raises:
        ValueError: If n is not positive.
    """
    if n < 1:
        raise ValueError(f"a transform has a positive size, not {n}")
    known = [k for k in range(2, MAX_ORDER + 1) if n % k == 0 and is_known_order(k)]
    splits = [(n,)] + [(*hadamard_orders(n // k), k) for k in known if k < n]
    best = min(splits, key=lambda orders: (_fall_back(orders), len(orders), sum(orders)))
    return tuple(sorted(best, key=lambda order: (order & -order, order)))


def _fall_back(orders: tuple[int, ...]) -> int:
    """Product of the orders without a Hadamard matrix; 1 where the whole transform is one."""
    return prod(order for order in orders if not is_known_order(order))


def hadamard_factors(
    n: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> tuple[Tensor, ...]:
    """The factors F_1 … F_k [f, f] of size n, without the 1/√n: what `apply_hadamard` takes.

    Entries are ±1, exact in every dtype, but for the Hartley factor. Take them once, outside compiled code.

    Args:
        n: Size of the transform.
        dtype: Of the factors; one narrower than float64 limits the precision of the Hartley factor.
        device: Of the factors; the CPU where it is not given, whatever torch's default device.

    Raises:
        ValueError: If n is not positive.
        ImportError: If a table is needed and compressed-tensors is not installed.
    """
    return tuple(_factor(order).to(device, dtype, copy=True) for order in hadamard_orders(n))


@cache
def _factor(order: int) -> Tensor:
    """Hadamard matrix [order, order] in int8, or Hartley's in float64 where none is known."""
    if not is_known_order(order):
        steps = torch.arange(order, device="cpu")
        angle = steps.outer(steps).remainder(order).double() * (2 * torch.pi / order)  # reduced while exact
        return angle.cos() + angle.sin()
    if order & (order - 1):
        return _table(order)
    sylvester = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(sylvester) < order:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    return sylvester


def _table(order: int) -> Tensor:
    """Hadamard matrix of a multiple of four from the data of compressed-tensors, without importing that package."""
    package = find_spec("compressed_tensors")
    if package is None or package.origin is None:
        raise ImportError(f"the Hadamard matrix of order {order} is part of compressed-tensors: pip install it")
    with safe_open(Path(package.origin).parent / "transform/utils/hadamards.safetensors", "pt") as tables:
        return tables.get_tensor(str(order))


def apply_hadamard(x: Tensor, factors: Sequence[Tensor], *, transpose: bool = False, dim: int = -1) -> Tensor:
    """x·H along one dimension, as a product with each small factor; differentiable and compilable.

    As (x·H)·(W·H)ᵀ = x·Wᵀ, activations and the input dimension of weights [O, I] are rotated by the same call. Products
    run in x's dtype and round to it after each factor, so give float64 for weights that are folded; 16 bits lose 0.3 %
    and are five times as fast as a detour through float32.

    Args:
        x: Any shape, any float dtype.
        factors: From `hadamard_factors(x.shape[dim])`, on x's device, any dtype; cast to x's here.
        transpose: Apply Hᵀ = H⁻¹ instead.
        dim: The dimension that is transformed; −2 of [..., heads, head_dim] mixes the heads.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: If the factors belong to another size.
    """
    size, orders = x.shape[dim], [len(factor) for factor in factors]
    if prod(orders) != size:
        raise ValueError(f"factors of orders {orders} do not make up a size of {size}")
    y = x * size**-0.5  # before the products: growth by √n would overflow float16
    inner = x.shape[dim:].numel()
    for factor, order in zip(factors, orders, strict=True):
        left = factor.to(x.dtype) if transpose else factor.to(x.dtype).mT
        inner //= order
        # one dense product from the right where nothing lies further in, else a batched one from the left: no copies
        y = left @ y.reshape(-1, order, inner) if inner > 1 else y.reshape(-1, order) @ left.mT
    return y.reshape(x.shape)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """H [n, n] in full, computed in float64, on the CPU; for tests and for small n.

    Raises:
        ValueError: If n is not positive.
    """
    h_NN = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for factor in hadamard_factors(n, torch.float64):
        h_NN = torch.kron(h_NN, factor)
    return (h_NN * n**-0.5).to(dtype)


def random_signs(n: int, seed: int) -> Tensor:
    """Signs ±1 [n], float64 on the CPU, a function of n and the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (n,), generator=generator, dtype=torch.float64, device="cpu") * 2 - 1


def random_hadamard_matrix(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """QuaRot's random rotation Q = diag(signs)·H [n, n]; `apply_hadamard(x * random_signs(n, seed), …)` is x·Q.

    The signs stand before H, where they change what is mixed; behind it they would only flip the result's signs.
    """
    return (random_signs(n, seed)[:, None] * hadamard_matrix(n)).to(dtype)
