"""What attention sees of keys and values: the prompt untouched in front, the rest rounded, once and for all."""

import pytest
import torch

from bisup_lightning.model.kv import BlockKV, KVQuantizer, KVRecorder, PromptCache, PromptKV
from bisup_lightning.quant.hadamard import hadamard_matrix
from bisup_lightning.quant.spec import QuantSpec, Scheme
from tests import reference

HEADS, DIM, LAYERS = 2, 8, 3
HEAD, TOKEN = QuantSpec(4, False, "head"), QuantSpec(3, False, "token")
QUANTIZERS = {
    "none": KVQuantizer(None),
    "head": KVQuantizer(HEAD),
    "token": KVQuantizer(TOKEN),
    "hadamard": KVQuantizer(HEAD, hadamard=True),
    "hadamard token": KVQuantizer(TOKEN, hadamard=True),
    "symmetric": KVQuantizer(QuantSpec(4, True, "head")),
}
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


def holding(cache):
    """A cache whose inputs begin with the prompt."""
    cache.begin(None, inputs_hold_prompt=True)
    return cache


def keys_values(length, batch=2, seed=0, dim=DIM, dtype=torch.float32):
    """Random k and v [B, H, T, d], off zero, with a loud channel in k."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, HEADS, length, dim, generator=generator) + 0.3 for _ in "kv")
    k[..., 1] *= 8
    return k.to(dtype), v.to(dtype)


def prompt_kv(length, dtype=torch.float32):
    """A PromptKV with a prompt of its own in every layer."""
    prompt = PromptKV(LAYERS, HEADS, length, DIM)
    for index in range(LAYERS):
        for name, tensor in zip(prompt.names(index), keys_values(length, 1, seed=50 + index, dtype=dtype), strict=True):
            setattr(prompt, name, tensor[0])
    return prompt


def equal(got, wanted):
    """Keys and values, bit for bit."""
    return all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))


# --- the quantizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_shared_by_a_head_or_by_a_token(granularity, bits, symmetric):
    k, v = keys_values(3, dtype=torch.float64)
    got = KVQuantizer(QuantSpec(bits, symmetric, granularity))(k, v)
    for mine, x in zip(got, (k, v), strict=True):
        rows = x if granularity == "head" else x.transpose(1, 2).flatten(2)  # a row: what shares a scale
        wanted = reference.dequantize(*reference.quantize(rows, bits, symmetric))
        wanted = wanted if granularity == "head" else wanted.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)


def test_a_loud_head_spoils_its_neighbour_only_by_token():
    """The reason for `head`: each head has its own scale."""
    k, v = keys_values(4)
    loud = k.clone()
    loud[:, 1] *= 100
    for spec, spoiled in ((HEAD, False), (TOKEN, True)):
        quiet_alone, _ = KVQuantizer(spec)(k, v)
        quiet_beside_loud, _ = KVQuantizer(spec)(loud, v)
        assert torch.equal(quiet_alone[:, 0], quiet_beside_loud[:, 0]) != spoiled


@pytest.mark.parametrize("dim", [8, 12, 80, 6])
@pytest.mark.parametrize("spec", [HEAD, TOKEN], ids=["head", "token"])
def test_hadamard_rounds_keys_in_the_rotated_basis_and_values_as_they_are(spec, dim):
    """⟨kH⟩Hᵀ, so that q·kᵀ needs no hook on q: qH·⟨kH⟩ᵀ = q·(⟨kH⟩Hᵀ)ᵀ."""
    k, v = keys_values(3, dim=dim, dtype=torch.float64)
    h = hadamard_matrix(dim)
    got_k, got_v = KVQuantizer(spec, hadamard=True)(k, v)
    rounded, plain_v = KVQuantizer(spec)(k @ h, v)
    torch.testing.assert_close(got_k, rounded @ h.T, rtol=0, atol=1e-10)
    assert torch.equal(got_v, plain_v)
    q = keys_values(3, seed=1, dim=dim, dtype=torch.float64)[0]
    torch.testing.assert_close(q @ got_k.mT, (q @ h) @ rounded.mT, rtol=0, atol=1e-9)


def test_hadamard_helps_against_a_loud_channel():
    k, v = keys_values(64)
    errors = [
        (KVQuantizer(QuantSpec(3, False, "head"), hadamard)(k, v)[0] - k).norm().item() for hadamard in (False, True)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_without_a_quantizer_even_the_rotation_leaves_every_bit():
    k, v = keys_values(5)
    assert equal(KVQuantizer(None, hadamard=True)(k, v), (k, v))


def test_scheme_decides():
    k, v = keys_values(5)
    assert equal(KVQuantizer.of(Scheme(kv=TOKEN, hadamard=True))(k, v), KVQuantizer(TOKEN, hadamard=True)(k, v))
    assert equal(KVQuantizer.of(Scheme(kv=None))(k, v), (k, v))


def test_gradients_pass_through_to_keys_and_values():
    """Calibration differentiates through ⟨k⟩ and ⟨v⟩."""
    k, v = (tensor.requires_grad_() for tensor in keys_values(3))
    got_k, got_v = BlockKV(KVQuantizer(HEAD, hadamard=True)).update(k, v, 0)
    ((got_k * torch.randn_like(got_k)).sum() + (got_v * torch.randn_like(got_v)).sum()).backward()
    assert k.grad.norm() > 0
    assert v.grad.norm() > 0


# --- whole sequences, chunks, single tokens ---------------------------------------------------------------------------


def chunks_of(x, sizes):
    """[B, H, T, d] in chunks along T."""
    return x.split(sizes, dim=2)


@every_quantizer
@pytest.mark.parametrize("prompt_length", [0, 1, 3])
@pytest.mark.parametrize("sizes", [[7], [1] * 7, [4, 1, 2], [1, 6]], ids=str)
def test_the_cache_gives_what_whole_sequences_give(quantizer, prompt_length, sizes):
    """A token's ⟨k⟩ and ⟨v⟩ depend on that token alone, so the cache may grow in any steps: bit for bit."""
    prompt = prompt_kv(prompt_length) if prompt_length else None
    cache = PromptCache(LAYERS, quantizer, prompt)
    k, v = keys_values(7)
    for index in range(LAYERS):
        whole = BlockKV(quantizer, None if prompt is None else prompt.of_layer(index)).update(k, v, index)
        seen = prompt_length
        for k_part, v_part in zip(chunks_of(k, sizes), chunks_of(v, sizes), strict=True):
            assert cache.get_seq_length(index) == seen
            kv_length, offset = cache.get_mask_sizes(k_part.shape[2], index)
            got = cache.update(k_part, v_part, index)
            seen += k_part.shape[2]
            assert (kv_length, offset) == (seen, 0)
            assert equal(got, tuple(part[:, :, :seen] for part in whole))
        assert equal(got, whole)


@every_quantizer
def test_the_prompt_is_never_rounded(quantizer):
    prompt = prompt_kv(3)
    k, v = keys_values(4)
    wanted = tuple(part.expand(2, -1, -1, -1) for part in prompt.of_layer(1))
    for sight in (
        BlockKV(quantizer, prompt.of_layer(1)).update(k, v, 1),
        PromptCache(LAYERS, quantizer, prompt).update(k, v, 1),
        holding(PromptCache(LAYERS, quantizer, prompt)).update(k, v, 1),
    ):
        assert equal(tuple(part[:, :, :3] for part in sight), wanted)


@every_quantizer
@pytest.mark.parametrize("prompt_length", [1, 3])
@pytest.mark.parametrize("sizes", [[4], [1] * 4, [3, 1]], ids=str)
def test_inputs_that_hold_the_prompt_see_its_exact_keys(quantizer, prompt_length, sizes):
    """What arrives for the prompt's own places is replaced; the rest is as if the prompt had stood in front."""
    prompt = prompt_kv(prompt_length)
    k, v = keys_values(4)
    k_own, v_own = keys_values(prompt_length, seed=9)  # what the quantized block makes of the prompt
    cache = holding(PromptCache(LAYERS, quantizer, prompt))
    assert cache.get_seq_length() == 0
    assert cache.tokens_in_front == 0
    k_parts, v_parts = chunks_of(k, sizes), chunks_of(v, sizes)
    first = torch.cat([k_own, k_parts[0]], 2), torch.cat([v_own, v_parts[0]], 2)
    got = cache.update(*first, 0)
    for k_part, v_part in zip(k_parts[1:], v_parts[1:], strict=True):
        got = cache.update(k_part, v_part, 0)
    assert equal(got, BlockKV(quantizer, prompt.of_layer(0)).update(k, v, 0))
    assert cache.get_seq_length() == prompt_length + 4


def test_the_prompt_counts_before_anything_arrives():
    cache = PromptCache(LAYERS, KVQuantizer(HEAD), prompt_kv(3))
    assert cache.tokens_in_front == cache.get_seq_length() == 3
    assert cache.get_mask_sizes(5, 0) == (8, 0)
    assert PromptCache(LAYERS, KVQuantizer(HEAD), None).get_seq_length() == 0


def test_each_layer_has_its_own_prompt():
    prompt = prompt_kv(2)
    cache = PromptCache(LAYERS, KVQuantizer(None), prompt)
    k, v = keys_values(1)
    seen = [cache.update(k, v, index)[0][0, :, :2] for index in range(LAYERS)]
    for index in range(LAYERS):
        assert torch.equal(seen[index], prompt.of_layer(index)[0])
    assert not torch.equal(seen[0], seen[1])


def test_reordered_for_beam_search_the_prompt_stays():
    prompt = prompt_kv(2)
    cache = PromptCache(LAYERS, KVQuantizer(HEAD), prompt)
    k, v = keys_values(3)
    for index in range(LAYERS):
        cache.update(k, v, index)
    cache.reorder_cache(torch.tensor([1, 1]))
    k_next, v_next = keys_values(1, seed=3)
    for index in range(LAYERS):
        got = cache.update(k_next, v_next, index)
        chosen = torch.cat([k[[1, 1]], k_next], 2), torch.cat([v[[1, 1]], v_next], 2)
        assert equal(got, BlockKV(KVQuantizer(HEAD), prompt.of_layer(index)).update(*chosen, index))


def test_a_prompt_takes_the_dtype_of_what_it_stands_before():
    """Stored in the checkpoint's dtype, computed in the model's: widened without loss."""
    prompt = prompt_kv(2, torch.bfloat16)
    k, v = keys_values(3)
    got = BlockKV(KVQuantizer(HEAD), prompt.of_layer(0)).update(k, v, 0)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0][0, :, :2], prompt.of_layer(0)[0].float())


def test_the_recorder_keeps_a_copy_and_changes_nothing():
    k, v = keys_values(3, batch=1)
    recorder = KVRecorder()
    passed = recorder.update(k, v, 0)
    assert equal(passed, (k, v))
    wanted = k.clone()
    k.zero_()  # the layer may reuse its memory
    assert torch.equal(recorder.recorded[0], wanted[0])
    assert torch.equal(recorder.recorded[1], v[0])


def test_a_prompt_is_saved_and_read_by_name():
    prompt, other = prompt_kv(3), PromptKV(LAYERS, HEADS, 3, DIM)
    prompt.ids.copy_(torch.tensor([5, 6, 7]))
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(other.ids, prompt.ids)
    assert all(equal(other.of_layer(index), prompt.of_layer(index)) for index in range(LAYERS))
    assert {name for index in range(LAYERS) for name in PromptKV.names(index)} | {"ids"} == set(prompt.state_dict())
