"""What the application knows of an architecture must be what transformers does."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bisup_lightning.errors import UserError
from bisup_lightning.model.family import (
    ATTENTION_OUTPUT,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEAR_INPUTS,
    MLP_ACTIVATION,
    SUPPORTED,
    Family,
    decoder,
    decoder_layers,
    head_dim,
    layer_prefix,
    linear_inputs,
    online_rotation,
    split_gate,
)
from bisup_lightning.quant.gated import Gated
from tests.inputs import SMALL

every_type = pytest.mark.parametrize("model_type", SUPPORTED)


def config_of(model_type, **overrides):
    return AutoConfig.for_model(model_type, **{**SMALL, "vocab_size": 64, **overrides})


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@every_type
def test_names_and_shapes_are_those_of_the_state_dict(model_type):
    config = config_of(model_type, attention_bias=True)
    family, state = Family(config), model_of(config).state_dict()
    for index in range(family.num_layers):
        shapes = family.layer_shapes(index)
        prefix = layer_prefix(index)
        assert shapes == {name.removeprefix(prefix): t.shape for name, t in state.items() if name.startswith(prefix)}
    outside = {name for name in state if not name.startswith("model.layers.")}
    assert outside == {EMBEDDING, FINAL_NORM, HEAD}
    assert state[EMBEDDING].shape == (family.vocab_size, family.hidden_size)


@every_type
def test_every_linear_of_a_block_reads_one_quantized_input(model_type):
    """No linear is forgotten and none is listed twice; each reads what the entry's norm or producers make."""
    config = config_of(model_type)
    layer = Family(config).empty_layer(0)
    linears = {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    listed = [name for entry in LINEAR_INPUTS for name in entry.linears]
    assert sorted(listed) == sorted(linears)
    for entry, members in linear_inputs(layer):
        assert [layer.get_submodule(name) for name in entry.linears] == members
        assert len({member.in_features for member in members}) == 1
        if entry.norm is not None:
            assert layer.get_submodule(entry.norm).weight.shape == (members[0].in_features,)
        for producer in entry.producers:
            assert layer.get_submodule(producer).out_features == members[0].in_features


@every_type
def test_linears_named_together_do_read_the_same_tensor(model_type):
    """Watched while transformers' own block runs; a norm named as the maker did make it."""
    model, seen, made = model_of(config_of(model_type)), {}, {}
    layer = decoder_layers(model)[0]
    for entry in LINEAR_INPUTS:
        for name in entry.linears:
            layer.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        if entry.norm:
            layer.get_submodule(entry.norm).register_forward_hook(lambda _, __, y, e=entry.name: made.update({e: y}))
    with torch.no_grad():
        decoder(model)(torch.arange(5)[None])
    for entry in LINEAR_INPUTS:
        inputs = [seen[name] for name in entry.linears] + ([made[entry.name]] if entry.norm else [])
        assert all(other is inputs[0] for other in inputs)


@pytest.mark.parametrize(
    ("model_type", "overrides", "size"),
    [
        ("llama", {}, 16),
        ("llama", {"head_dim": 24}, 24),
        ("mistral", {"head_dim": 8}, 8),
        ("qwen2", {"hidden_size": 96, "num_attention_heads": 6}, 16),
        ("qwen3", {"head_dim": 80}, 80),
    ],
)
def test_head_dim_is_what_the_projections_say(model_type, overrides, size):
    config = config_of(model_type, **overrides)
    family = Family(config)
    assert head_dim(config) == family.head_dim == size
    assert family.layer_shapes(0)["self_attn.v_proj.weight"][0] == family.num_kv_heads * size
    assert online_rotation(ATTENTION_OUTPUT, config) * size == family.layer_shapes(0)["self_attn.o_proj.weight"][1]
    assert online_rotation(MLP_ACTIVATION, config) == family.layer_shapes(0)["mlp.down_proj.weight"][1]


@pytest.mark.parametrize(
    ("model_type", "overrides", "windows"),
    [
        ("llama", {}, [None, None, None]),
        ("mistral", {"sliding_window": 8}, [8, 8, 8]),
        ("mistral", {"sliding_window": None}, [None, None, None]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [None, 8, 8]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, [None, None, None]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, [None, None, 8]),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [8, None, 8],
        ),
    ],
)
def test_sliding_window_of_each_block(model_type, overrides, windows):
    family = Family(config_of(model_type, num_hidden_layers=3, **overrides))
    assert [family.sliding_window(index) for index in range(3)] == windows


@every_type
def test_empty_layers_are_separate_and_take_no_memory(model_type):
    family = Family(config_of(model_type))
    first, second = family.empty_layer(0), family.empty_layer(0)
    assert all(tensor.is_meta for tensor in first.state_dict().values())
    first.load_state_dict({name: torch.ones(shape) for name, shape in family.layer_shapes(0).items()}, assign=True)
    assert all(tensor.is_meta for tensor in second.state_dict().values())
    assert not first.training  # attention dropout, where a configuration has one, is off


@every_type
def test_rotary_and_final_norm_are_the_models_own(model_type):
    config = config_of(model_type)
    model, family = model_of(config), Family(config)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(64))
    x, places = torch.randn(2, 7, 64), torch.arange(3, 10)[None]
    for mine, theirs in zip(family.rotary()(x, places), model.model.rotary_emb(x, places), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(family.final_norm(model.model.norm.weight)(x), model.model.norm(x))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "mixtral", "opt"])
def test_an_unsupported_architecture_is_named_beside_those_supported(tmp_path, model_type):
    config = AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        Family.of_folder(str(tmp_path), config.num_hidden_layers)
    message = str(caught.value)
    assert f"'{model_type}'" in message
    assert all(supported in message for supported in SUPPORTED)
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    ["{", "", "[]", "nonsense", '{"hidden_size": 4}', json.dumps({"model_type": "no-such-thing"})],
)
def test_a_damaged_configuration_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        Family.of_folder(str(tmp_path), 2)
    assert "\n" not in str(caught.value)


@every_type
def test_an_mlp_hands_on_the_factors_of_its_gate_while_it_is_told_to(model_type):
    layer = decoder_layers(model_of(config_of(model_type)))[0]
    mlp, seen = layer.get_submodule("mlp"), []
    x_BTD = torch.randn(2, 3, mlp.get_submodule("gate_proj").in_features)
    whole_BTD = mlp(x_BTD)

    def product_of(module, arguments):
        seen.append(arguments[0])
        return (seen[-1].product(),) if isinstance(seen[-1], Gated) else None

    mlp.get_submodule("down_proj").register_forward_pre_hook(product_of)
    for on in (True, False):
        split_gate(layer, on)
        assert torch.equal(mlp(x_BTD), whole_BTD)
    assert [type(x) for x in seen] == [Gated, torch.Tensor]


def test_a_gate_of_another_kind_stays_whole():
    layer = Family(config_of("llama", hidden_act="gelu")).empty_layer(0)
    split_gate(layer, on=True)
    assert "forward" not in vars(layer.get_submodule("mlp"))
