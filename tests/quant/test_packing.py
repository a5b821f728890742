import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bisup_lightning.quant.affine import dequantize, fake_quantize, quantize
from bisup_lightning.quant.packing import pack, unpack
from bisup_lightning.quant.spec import QuantSpec
from tests import reference

every_bits = pytest.mark.parametrize("bits", range(1, 9))
properties = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 4), max_size=2).flatmap(lambda lead: st.integers(1, 40).map(lambda i: (*lead, i)))


def random_codes(shape, bits, qmin, seed, dtype=torch.int16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(qmin, qmin + 2**bits, shape, generator=generator).to(dtype)


@every_bits
@pytest.mark.parametrize("symmetric", [True, False])
@properties
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_round_trip_layout_and_size(bits, symmetric, shape, seed):
    qmin = -(2 ** (bits - 1)) if symmetric else 0
    codes = random_codes(shape, bits, qmin, seed)
    packed = pack(codes, bits, qmin)
    restored = unpack(packed, shape[-1], qmin)
    assert torch.equal(restored.to(torch.int16), codes)
    assert restored.dtype == (torch.int8 if symmetric else torch.int16)

    # Exactly `bits` bytes for eight codes, and the very bytes of the reference.
    assert packed.dtype == torch.uint8
    assert packed.numel() == codes[..., 0].numel() * bits * -(-shape[-1] // 8)
    for row in reference.rows_of(codes):
        assert packed[row].tolist() == reference.pack(codes[row].tolist(), bits, qmin)
        assert restored[row].tolist() == reference.unpack(packed[row].tolist(), shape[-1], qmin)


@every_bits
def test_every_code_survives_in_every_place(bits):
    qmin = -(2 ** (bits - 1))
    codes = torch.arange(qmin, qmin + 2**bits).unsqueeze(1).repeat(1, 8)
    codes[:, 1::2] = codes.flip(0)[:, 1::2]
    assert torch.equal(unpack(pack(codes, bits, qmin), 8, qmin).long(), codes)


@every_bits
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype, bits):
    qmin = -(2 ** (bits - 1))
    codes = random_codes((3, 21), bits, qmin, seed=0, dtype=dtype)
    assert torch.equal(pack(codes, bits, qmin), pack(codes.to(torch.int16), bits, qmin))


def test_views_pack_as_their_copies():
    codes = random_codes((24, 10), 3, -4, seed=1)
    assert torch.equal(pack(codes.T, 3, -4), pack(codes.T.contiguous(), 3, -4))
    assert torch.equal(pack(codes[:, 1::3], 3, -4), pack(codes[:, 1::3].contiguous(), 3, -4))


def test_filling_is_zero_bits():
    packed = pack(torch.full((1, 9), 3), bits=3, qmin=-4)  # code 3 is stored as 7: all ones
    assert packed.tolist() == [[[255, 1]] * 3]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 16)])
def test_nothing_packs_to_nothing(shape):
    packed = pack(torch.zeros(shape, dtype=torch.int16), 4, -8)
    assert packed.numel() == 0
    assert unpack(packed, shape[-1], -8).shape == shape


@every_bits
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_refuses_codes_out_of_range(bits, dtype):
    qmin = -(2 ** (bits - 1))
    for wrong in (qmin - 1, qmin + 2**bits, 32767, -32768):
        codes = torch.full((2, 9), qmin, dtype=dtype)
        codes[1, 7] = wrong
        with pytest.raises(ValueError, match=rf"outside \[{qmin}, {qmin + 2**bits - 1}\]"):
            pack(codes, bits, qmin)


def test_refuses_negative_codes_when_unsigned():
    with pytest.raises(ValueError, match=r"outside \[0, 15\]"):
        pack(torch.tensor([0, 3, -1]), 4, 0)


@pytest.mark.parametrize("wrong", [65536, -65536, 2**17 + 3])
def test_refuses_codes_that_wrap_into_range(wrong):
    with pytest.raises(ValueError, match="outside"):
        pack(torch.tensor([1, wrong, 0]), 4, -8)


def test_refuses_widths_above_eight():
    with pytest.raises(ValueError, match="bits"):
        pack(torch.tensor([300, 256]), 9, 0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_weight_survives_storage_bit_for_bit(bits, symmetric):
    w_OI = torch.randn(5, 24, generator=torch.Generator().manual_seed(bits))
    spec = QuantSpec(bits, symmetric, group_size=8)
    codes, scale, offset = quantize(w_OI, spec)
    restored = unpack(pack(codes, bits, spec.qmin), 24, spec.qmin)
    assert torch.equal(dequantize(restored, scale, offset), fake_quantize(w_OI, spec))
