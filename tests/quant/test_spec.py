import dataclasses

import pytest
import torch

from bisup_lightning.quant.affine import fake_quantize, to_groups
from bisup_lightning.quant.spec import Precision, QuantSpec


@pytest.mark.parametrize(
    ("bits", "symmetric_range", "unsigned_max"),
    [
        (2, (-2, 1), 3),
        (3, (-4, 3), 7),
        (4, (-8, 7), 15),
        (5, (-16, 15), 31),
        (6, (-32, 31), 63),
        (7, (-64, 63), 127),
        (8, (-128, 127), 255),
    ],
)
def test_code_range(bits, symmetric_range, unsigned_max):
    symmetric, asymmetric = QuantSpec(bits), QuantSpec(bits, symmetric=False)
    assert (symmetric.qmin, symmetric.qmax) == symmetric_range
    assert (asymmetric.qmin, asymmetric.qmax) == (0, unsigned_max)


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, not {bits}"):
        QuantSpec(bits)


@pytest.mark.parametrize("group_size", [-8, 0, 1, 7])
def test_refuses_small_groups(group_size):
    with pytest.raises(ValueError, match=f"group_size must be at least 8, not {group_size}"):
        QuantSpec(4, group_size=group_size)


@pytest.mark.parametrize(
    ("group_size", "features", "groups"), [(None, 24, 1), (None, 7, 1), (8, 24, 3), (24, 24, 1), (128, 4096, 32)]
)
def test_groups(group_size, features, groups):
    assert QuantSpec(4, group_size=group_size).groups(features) == groups


@pytest.mark.parametrize(("group_size", "features"), [(8, 20), (16, 24), (128, 64), (9, 8)])
def test_group_must_divide_the_row(group_size, features):
    spec = QuantSpec(4, group_size=group_size)
    message = f"group_size {group_size} does not divide {features} features"
    for refused in (
        lambda: spec.groups(features),
        lambda: spec.clip_shape(2, features),
        lambda: to_groups(torch.zeros(2, features), spec),
        lambda: fake_quantize(torch.zeros(2, features), spec),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_groups_are_neighbours():
    x_BI = torch.arange(48.0).reshape(2, 24)
    x_BGg = to_groups(x_BI, QuantSpec(4, group_size=8))
    for b in range(2):
        for i in range(24):
            assert x_BGg[b, i // 8, i % 8] == x_BI[b, i]


@pytest.mark.parametrize(
    ("granularity", "group_size", "shape"),
    [
        ("row", None, (5, 1)),
        ("row", 8, (5, 3)),
        ("group", None, (1, 1)),
        ("group", 8, (1, 3)),
        ("tensor", None, (1, 1)),
        ("tensor", 8, (1, 1)),
    ],
)
def test_clip_shape_says_what_shares_a_clip(granularity, group_size, shape):
    """And what that means: a changed clip value reaches the elements of its sharers and no others."""
    spec = QuantSpec(4, granularity=granularity, group_size=group_size)
    assert spec.clip_shape(5, 24) == shape

    w_OI = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    clip = torch.ones(shape)
    clip[0, -1] = 0.5
    changed = (fake_quantize(w_OI, spec, clip) != fake_quantize(w_OI, spec)).reshape(5, spec.groups(24), -1).any(-1)
    expected = torch.zeros_like(changed)
    expected[0 : 5 if granularity != "row" else 1, 0 if granularity == "tensor" else -1 :] = True
    assert torch.equal(changed, expected)


def test_is_a_value():
    assert QuantSpec(4, group_size=128) == QuantSpec(bits=4, group_size=128)
    assert len({QuantSpec(4), QuantSpec(4), QuantSpec(3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec(4).bits = 3
    with pytest.raises(ValueError, match="bits"):
        dataclasses.replace(QuantSpec(4), bits=9)


def test_precision_is_w4a4kv4_unless_said_otherwise():
    precision = Precision()
    assert (precision.weights.bits, precision.activations.bits, precision.kv.bits) == (4, 4, 4)
    assert precision.weights.symmetric
    assert precision.activations.symmetric
    assert not precision.kv.symmetric


def test_precision_may_leave_activations_and_kv_alone():
    precision = Precision(QuantSpec(3, group_size=128), activations=None, kv=None)
    assert precision == Precision(weights=QuantSpec(3, group_size=128), activations=None, kv=None)
    assert precision != Precision(QuantSpec(3, group_size=128))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"weights": QuantSpec(4, symmetric=False)}, "weights.symmetric"),
        ({"activations": QuantSpec(4, symmetric=False)}, "activations.symmetric"),
        ({"weights": QuantSpec(4, granularity="head")}, "weights.granularity .* not head"),
        ({"activations": QuantSpec(4, granularity="token")}, "activations.granularity .* not token"),
        ({"kv": QuantSpec(4, symmetric=False, granularity="row")}, "kv.granularity .* not row"),
        ({"kv": QuantSpec(4, symmetric=False, granularity="head", group_size=64)}, "kv.group_size"),
    ],
)
def test_precision_refuses_what_has_no_meaning_in_its_place(places, message):
    with pytest.raises(ValueError, match=message):
        Precision(**places)
