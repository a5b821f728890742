"""QuaRot leaves the function as it is: h becomes hQ, logits stay, and outliers are spread."""

import pytest
import torch
from safetensors.torch import load_file

from bisup_lightning.model.block import quantize_layer
from bisup_lightning.model.checkpoint import SINGLE
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, HEAD
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.quant.hadamard import hadamard_orders, is_known_order, random_hadamard_matrix
from bisup_lightning.quant.spec import Precision, QuantSpec, Scheme
from bisup_lightning.transform.invariance import check_invariance, relative_logit_error
from bisup_lightning.transform.rotate import QuaRot
from tests.transform.models import (
    CPU,
    MODELS,
    blockwise,
    exact_layer,
    hidden_states,
    relative,
    run,
    tokens,
    unrounded,
)

SEED = 5
every_model = pytest.mark.parametrize("name", MODELS)
AT_RUN_TIME = Scheme(QuantSpec(4), None, None, hadamard=True)


def both(folder, dtype=torch.float64):
    """The model, the rotated model, and Q."""
    plain = blockwise(folder, dtype)
    return plain, blockwise(folder, dtype, QuaRot(SEED)), random_hadamard_matrix(plain.family.hidden_size, SEED)


@every_model
def test_logits_stay(checkpoint_of, name):
    plain, rotated, _ = both(checkpoint_of(name), torch.float32)
    error = check_invariance(plain, rotated, tokens())
    assert error == relative_logit_error(plain, rotated, tokens())
    assert 0 < error < 1e-5


@every_model
def test_logits_stay_in_float64_as_far_as_transformers_norms_go(checkpoint_of, name):
    """Those compute in float32; all else is exact."""
    plain, rotated, _ = both(checkpoint_of(name))
    assert relative_logit_error(plain, rotated, tokens()) < 2e-6


@every_model
def test_each_block_is_the_block_in_the_rotated_basis(checkpoint_of, name):
    """block(hQ) = block(h)Q, to float64's precision with exact norms, biases and shards and odd sizes included."""
    plain, rotated, q = both(checkpoint_of(name))
    x = hidden_states(plain)
    for index in range(plain.num_layers):
        got = run(rotated, exact_layer(rotated, index), x @ q, index)
        assert relative(got, run(plain, exact_layer(plain, index), x, index) @ q) < 1e-9


@every_model
def test_rotations_at_run_time_cancel(checkpoint_of, name):
    """With nothing rounded, the quantized block's Hadamards before o_proj and down_proj change nothing.

    Sizes without a Hadamard matrix fall back to one whose entries are float32 numbers.
    """
    plain, rotated, q = both(checkpoint_of(name))
    x = hidden_states(plain)
    wanted = run(plain, exact_layer(plain, 0), x) @ q
    sizes = plain.family.config.num_attention_heads, plain.family.config.intermediate_size
    whole = all(is_known_order(order) for size in sizes for order in hadamard_orders(size))
    assert relative(run(rotated, unrounded(rotated, 0, AT_RUN_TIME), x @ q), wanted) < (1e-9 if whole else 1e-6)


@every_model
def test_arranged_inputs_and_weights_meet_as_they_did(checkpoint_of, name):
    """x·Wᵀ = arrange(x)·arrange(W)ᵀ for every linear, and an arranged o_proj input is another tensor."""
    model = blockwise(checkpoint_of(name), torch.float64)
    layer, plain = exact_layer(model, 0), exact_layer(model, 0)
    quantize_layer(layer, AT_RUN_TIME, model.family.config, 1.0, torch.float64)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        weight = plain.get_submodule(part).weight
        x = torch.randn(3, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        arranged = layer.get_submodule(part).input_quantizer.arrange(x)
        assert relative(arranged @ layer.get_submodule(part).weight.T, x @ weight.T) < 1e-6
        assert relative(arranged, x) > 0.5


@every_model
def test_norms_are_folded_and_the_head_is_untied(checkpoint_of, name):
    plain, rotated, q = both(checkpoint_of(name))
    stored = plain.checkpoint.read([EMBEDDING, FINAL_NORM, plain.checkpoint.head_name(tied=False)])
    stored = {key: tensor.double() for key, tensor in stored.items()}
    for index in range(rotated.num_layers):
        tensors = rotated.layer_tensors(index)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert tensors[f"{norm}.weight"].eq(1).all()
    tied = plain.family.config.tie_word_embeddings
    read = {key: rotated.checkpoint.read_shared(key, CPU, torch.float64) for key in (EMBEDDING, FINAL_NORM, HEAD)}
    assert rotated.checkpoint.head_name(tied) == HEAD
    assert read[FINAL_NORM].eq(1).all()
    head = stored[EMBEDDING if tied else HEAD]
    torch.testing.assert_close(read[EMBEDDING], stored[EMBEDDING] @ q, rtol=0, atol=1e-12)  # its mean is still there
    torch.testing.assert_close(read[HEAD], (head * stored[FINAL_NORM]) @ q, rtol=0, atol=1e-12)


def test_norms_inside_the_attention_are_left(checkpoint_of):
    """Qwen3's q_norm and k_norm stand behind the projections, where nothing is rotated."""
    plain, rotated, _ = both(checkpoint_of("qwen3, heads of 80"))
    for norm in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        assert torch.equal(rotated.layer_tensors(0)[norm], plain.layer_tensors(0)[norm])
        assert plain.layer_tensors(0)[norm].ne(1).any()


def test_weights_keep_their_size_and_no_row_its_place(checkpoint_of):
    """A rotation keeps ‖W‖, but for the norms folded in, which o_proj and down_proj do not have."""
    plain, rotated, _ = both(checkpoint_of("qwen2"))
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        before, after = plain.layer_tensors(0)[name], rotated.layer_tensors(0)[name]
        assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-12)
        assert relative(after, before) > 0.5


def test_the_seed_alone_decides_the_rotation(checkpoint_of):
    folder = checkpoint_of("qwen2")
    tensors = [blockwise(folder, torch.float32, QuaRot(seed)).layer_tensors(0) for seed in (5, 5, 6)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not torch.equal(tensors[0]["mlp.up_proj.weight"], tensors[2]["mlp.up_proj.weight"])


def cast_of(name, folder, dtype):
    """(a rotated tensor as it is read, the exact one cast to the dtype)."""
    exact, cast = (blockwise(folder, wanted, QuaRot(SEED)).layer_tensors(0)[name] for wanted in (torch.float64, dtype))
    return cast, exact.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_products_are_cast_once(checkpoint_of, name, dtype):
    """Computed in float64, a rotated tensor is the nearest to the exact one."""
    assert torch.equal(*cast_of(f"{name}.weight", checkpoint_of("llama, stored bfloat16"), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_rotations_of_the_values_are_cast_once(checkpoint_of, dtype):
    assert torch.equal(*cast_of("self_attn.v_proj.weight", checkpoint_of("llama, stored bfloat16"), dtype))


def test_the_checkpoint_on_disk_is_not_touched(checkpoint_of):
    folder = checkpoint_of("llama, tied, biases everywhere")
    before = load_file(folder / SINGLE)
    plain, rotated, _ = both(folder)
    for index in range(2):
        rotated.layer_tensors(index)
    rotated.head()
    after = load_file(folder / SINGLE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(
        plain.layer_tensors(0)["mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"].double()
    )


def test_outliers_are_spread_and_rounding_costs_less(checkpoint_of):
    """What it is for: with one channel forty times louder, W4A4KV4 loses less behind the rotation."""
    plain, rotated, q = both(checkpoint_of("llama"))
    x = hidden_states(plain, loud=3)
    rotated_x = x @ q
    assert x.abs().amax() / x.abs().median() > 5 * rotated_x.abs().amax() / rotated_x.abs().median()
    wanted, errors = run(plain, exact_layer(plain, 0), x), []
    for model, transform, inputs in ((plain, None, x), (rotated, QuaRot(SEED), rotated_x)):
        scheme = Scheme.of(Precision()) if transform is None else transform.scheme(Precision())
        layer = quantize_layer(exact_layer(model, 0), scheme, model.family.config, 0.9, torch.float64)
        got = run(model, layer, inputs, kv=BlockKV(KVQuantizer.of(scheme)))
        errors.append((got @ (torch.eye(len(q)).double() if transform is None else q.T) - wanted).norm().item())
    assert errors[1] < 0.8 * errors[0]


def test_scheme_asks_for_hadamards_at_run_time_and_keeps_the_precision():
    precision = Precision(QuantSpec(3), None, QuantSpec(3, False, "token"))
    scheme = QuaRot().scheme(precision)
    assert scheme.hadamard
    assert (scheme.outliers, scheme.weights, scheme.activations, scheme.kv) == (
        0, precision.weights, precision.activations, precision.kv,
    )  # fmt: skip
