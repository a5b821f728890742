"""Products of codes: exact on the tensor cores that have float8, with the gradients of the values' product."""

import pytest
import torch
import torch.nn.functional as F

from bisup_lightning.model.linear import InputQuantizer, QuantLinear
from bisup_lightning.quant import integer_product, operators
from bisup_lightning.quant.integer_product import Coded, coded_rows, multiplies
from bisup_lightning.quant.spec import QuantSpec, Segment

CUDA = torch.device("cuda")


def on_a_gpu_with(least):
    there = torch.cuda.is_available() and torch.cuda.get_device_capability() >= least
    return [pytest.mark.gpu, pytest.mark.skipif(not there, reason=f"needs a CUDA device of capability {least}")]


WAYS = [
    pytest.param(4, None, marks=on_a_gpu_with((8, 9)), id="rows"),
    pytest.param(5, None, marks=on_a_gpu_with((8, 9)), id="rows of 5 bits"),
    pytest.param(3, 128, marks=on_a_gpu_with((9, 0)), id="groups of 128"),
]


def factors(spec, tokens, rows, features, spread):
    """An activation with its codes, and a linear; `spread` 0 for values that are alike, whose sums are the largest."""
    generator = torch.Generator(CUDA).manual_seed(0)
    x_TI, w_OI = (
        (1 + spread * torch.randn(size, features, device=CUDA, generator=generator)).bfloat16()
        for size in (tokens, rows)
    )
    segment = Segment(features, spec)
    bias_O = torch.randn(rows, device=CUDA, generator=generator).bfloat16()
    linear = QuantLinear(w_OI, bias_O, [segment], torch.nn.Identity(), torch.bfloat16)
    assert multiplies([segment], linear.segments, w_OI)
    clip_G = torch.full((spec.groups(features),), 0.9, device=CUDA)
    return coded_rows(x_TI.requires_grad_(), segment, clip_G), linear


def exact(coded):
    """The values [N, I] that codes and scales stand for, in float64."""
    codes_NI = coded.codes.view(torch.float8_e4m3fn).double()
    groups = codes_NI.unflatten(-1, (len(coded.scale_GN), -1))
    return (groups * coded.scale_GN.T.double().unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize(("bits", "group_size"), WAYS)
@pytest.mark.parametrize("spread", [0.0, 0.3, 100.0])
@pytest.mark.parametrize(("tokens", "rows", "features"), [(16, 16, 128), (48, 80, 14336), (320, 1024, 4096)])
def test_codes_multiply_as_float64_does(bits, group_size, spread, tokens, rows, features):
    x, linear = factors(QuantSpec(bits, group_size=group_size), tokens, rows, features, spread)
    weight = linear.coded_weight()
    for coded in (x, weight):  # the values are the codes', but for bfloat16's last digit
        torch.testing.assert_close(coded.values.double(), exact(coded), rtol=2**-8, atol=0)
    product_NO = exact(x) @ exact(weight).T + linear.bias.double()
    magnitude_NO = exact(x).abs() @ exact(weight).abs().T + linear.bias.abs().double()
    error = (linear(x).double() - product_NO).abs()
    assert (error <= 2**-7 * product_NO.abs() + 2**-20 * magnitude_NO).all()  # product and sum each round to bfloat16


@pytest.mark.parametrize(("bits", "group_size"), WAYS)
def test_gradients_are_those_of_the_product_of_values(bits, group_size):
    x, linear = factors(QuantSpec(bits, group_size=group_size), 64, 96, 256, 100.0)
    weight, grad_NO = linear.coded_weight(), torch.randn(64, 96, device=CUDA).bfloat16()
    by_codes = integer_product.linear(x, weight, linear.bias)
    by_values = F.linear(x.values, weight.values, linear.bias)
    found, expected = (torch.autograd.grad(y, [x.values, weight.values], grad_NO) for y in (by_codes, by_values))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("bits", "group_size"), WAYS)
def test_codes_come_along_where_gradients_are_wanted_and_rows_allow(bits, group_size):
    quantizer = InputQuantizer([Segment(256, QuantSpec(bits, group_size=group_size))], 0.9, None).to(CUDA)
    quantizer.with_codes = True
    x_NI = torch.randn(32, 256, device=CUDA).bfloat16()
    assert isinstance(coded := quantizer(x_NI), Coded)
    assert isinstance(quantizer(x_NI[:30]), torch.Tensor)
    assert isinstance(quantizer(x_NI.float()), torch.Tensor)
    with torch.no_grad():
        assert torch.equal(quantizer(x_NI), coded.values)


@pytest.mark.parametrize(
    ("inputs", "weight", "shape", "dtype", "capability", "expected"),
    [
        (QuantSpec(4), QuantSpec(4), (64, 256), torch.bfloat16, (8, 9), True),
        (QuantSpec(5), QuantSpec(3), (64, 256), torch.bfloat16, (12, 0), True),
        (QuantSpec(4), QuantSpec(4, group_size=256), (64, 256), torch.bfloat16, (9, 0), True),
        (QuantSpec(4, group_size=128), QuantSpec(4, group_size=128), (64, 256), torch.bfloat16, (9, 0), True),
        (QuantSpec(4, group_size=128), QuantSpec(4, group_size=128), (64, 256), torch.bfloat16, (10, 0), False),
        (QuantSpec(4, group_size=64), QuantSpec(4, group_size=64), (64, 256), torch.bfloat16, (9, 0), False),
        (QuantSpec(4), QuantSpec(4, group_size=128), (64, 256), torch.bfloat16, (9, 0), False),
        (QuantSpec(6), QuantSpec(4), (64, 256), torch.bfloat16, (9, 0), False),
        (None, QuantSpec(4), (64, 256), torch.bfloat16, (9, 0), False),
        (QuantSpec(4), QuantSpec(4), (64, 256), torch.bfloat16, (8, 0), False),
        (QuantSpec(4), QuantSpec(4), (64, 256), torch.float16, (9, 0), False),
        (QuantSpec(4), QuantSpec(4), (60, 256), torch.bfloat16, (9, 0), False),
        (QuantSpec(4), QuantSpec(4), (64, 250), torch.bfloat16, (9, 0), False),
    ],
)
def test_what_is_multiplied_by_codes(monkeypatch, inputs, weight, shape, dtype, capability, expected):
    monkeypatch.setattr(operators, "supports", lambda x: True)
    monkeypatch.setattr(integer_product, "_capability", lambda x: capability)
    segments = [[Segment(shape[1], spec)] for spec in (inputs, weight)]
    assert multiplies(*segments, torch.empty(shape, dtype=dtype)) is expected


def test_a_part_in_another_precision_is_multiplied_by_values(monkeypatch):
    monkeypatch.setattr(integer_product, "_capability", lambda x: (9, 0))
    segments = [Segment(128, QuantSpec(4)), Segment(128, QuantSpec(8))]
    assert not multiplies(segments, segments, torch.empty(64, 256, dtype=torch.bfloat16))
