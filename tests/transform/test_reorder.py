"""Atom: the strongest channels stand last under a quantizer of their own, and the function stays."""

import pytest
import torch

from bisup_lightning.model.block import quantize_layer
from bisup_lightning.model.family import LINEAR_INPUTS, MLP_ACTIVATION
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.quant.affine import fake_quantize
from bisup_lightning.quant.spec import Precision, QuantSpec, Scheme
from bisup_lightning.transform.reorder import Atom
from bisup_lightning.transform.transform import NoTransform
from tests.transform.models import MODELS, blockwise, exact_layer, hidden_states, relative, run, unrounded

OUTLIERS = 8
every_model = pytest.mark.parametrize("name", MODELS)


def orders_of(model, index, x):
    """Atom's orders for a block, and what each linear input held, by its name [tokens, I]."""
    layer, read = exact_layer(model, index), {}
    statistics = InputStatistics(layer)
    for entry in LINEAR_INPUTS:
        layer.get_submodule(entry.linears[-1]).register_forward_pre_hook(
            lambda _, arguments, name=entry.name: read.update({name: arguments[0].flatten(0, 1)})
        )
    run(model, layer, x, index)
    statistics.add_pass()
    return Atom(OUTLIERS).orders(statistics), read


@every_model
def test_outliers_are_the_channels_of_largest_square_sum_and_stand_last(checkpoint_of, name):
    model = blockwise(checkpoint_of(name), torch.float64)
    orders, read = orders_of(model, 0, hidden_states(model, loud=3))
    for entry in LINEAR_INPUTS:
        strength = read[entry.name].square().sum(0)
        order = orders[entry.name]
        assert sorted(order.tolist()) == list(range(len(strength)))
        assert set(order[-OUTLIERS:].tolist()) == set(strength.topk(OUTLIERS).indices.tolist())
        rising = strength[order]
        assert (rising[1:] >= rising[:-1] * (1 - 1e-5)).all()  # groups hold channels of like strength
    assert orders["attention_input"][-1] == 3


@every_model
def test_with_nothing_rounded_the_reordered_block_is_the_block(checkpoint_of, name):
    """Orders at run time, those absorbed in gate and up, and their biases: to float64's precision."""
    model = blockwise(checkpoint_of(name), torch.float64)
    x = hidden_states(model, loud=3)
    scheme = Atom(OUTLIERS, None).scheme(Precision(QuantSpec(4), None, None))
    for index in range(model.num_layers):
        orders, _ = orders_of(model, index, x)
        wanted = run(model, exact_layer(model, index), x, index)
        assert relative(run(model, unrounded(model, index, scheme, orders), x, index), wanted) < 1e-12


@every_model
def test_arranged_inputs_and_weights_meet_as_they_did(checkpoint_of, name):
    """x·Wᵀ = arrange(x)·arrange(W)ᵀ for every linear that reorders at run time; the MLP's activation does not."""
    model = blockwise(checkpoint_of(name), torch.float64)
    orders, read = orders_of(model, 0, hidden_states(model))
    layer, plain = exact_layer(model, 0), exact_layer(model, 0)
    quantize_layer(
        layer, Scheme(QuantSpec(4), None, None, outliers=OUTLIERS), model.family.config, 1.0, torch.float64, orders
    )
    rows = orders[MLP_ACTIVATION.name]
    for entry in LINEAR_INPUTS:
        quantizer = layer.get_submodule(entry.norm).quantizer if entry.norm else None
        for part in entry.linears:
            linear, weight = layer.get_submodule(part), plain.get_submodule(part).weight
            arrange = (quantizer or linear.input_quantizer).arrange
            x = read[entry.name]
            if entry is MLP_ACTIVATION:  # arrives in the new order already
                assert torch.equal(arrange(x), x)
                x = x[:, rows]
                wanted = read[entry.name] @ weight.T
            else:
                wanted = x @ weight.T
                assert not torch.equal(arrange(x), x)
            if part in MLP_ACTIVATION.producers:
                wanted = wanted[:, rows]
            assert relative(arrange(x) @ linear.weight.T, wanted) < 1e-12


@pytest.mark.parametrize("outlier_bits", [8, 4, None])
def test_each_part_of_a_row_has_its_own_quantizer(checkpoint_of, outlier_bits):
    """Normal channels in groups at N bits, outliers in one piece at theirs, or not rounded at all."""
    model = blockwise(checkpoint_of("llama"), torch.float64)
    x = hidden_states(model, loud=3)
    orders, read = orders_of(model, 0, x)
    spec = QuantSpec(3, group_size=8)
    scheme = Atom(OUTLIERS, outlier_bits).scheme(Precision(spec, spec, None))
    layer = quantize_layer(exact_layer(model, 0), scheme, model.family.config, 1.0, torch.float64, orders)
    with torch.no_grad():
        got = layer.input_layernorm(x).flatten(0, 1)
    arranged = read["attention_input"][:, orders["attention_input"]]
    normal, loud = arranged[:, :-OUTLIERS], arranged[:, -OUTLIERS:]
    assert torch.equal(got[:, :-OUTLIERS], fake_quantize(normal, spec))
    wanted = loud if outlier_bits is None else fake_quantize(loud, QuantSpec(outlier_bits))
    assert torch.equal(got[:, -OUTLIERS:], wanted)


def test_rounding_costs_less_than_without(checkpoint_of):
    """What it is for; and with 16-bit outliers (QUIK) less than with 8-bit ones can't be worse by much."""
    model = blockwise(checkpoint_of("llama"), torch.float64)
    x = hidden_states(model, loud=3)
    orders, _ = orders_of(model, 0, x)
    wanted = run(model, exact_layer(model, 0), x)
    errors = {}
    for name, transform in {"none": NoTransform(), "atom": Atom(OUTLIERS), "quik": Atom(OUTLIERS, None)}.items():
        scheme = transform.scheme(Precision())
        given = orders if scheme.outliers else None
        layer = quantize_layer(exact_layer(model, 0), scheme, model.family.config, 0.9, torch.float64, given)
        errors[name] = relative(run(model, layer, x, kv=BlockKV(KVQuantizer.of(scheme))), wanted)
    assert errors["atom"] < 0.7 * errors["none"]
    assert errors["quik"] < 1.1 * errors["atom"]


def test_no_transform_is_no_transform(checkpoint_of):
    model = blockwise(checkpoint_of("llama"))
    transform = NoTransform()
    assert transform.checkpoint(model.checkpoint, model.family, torch.device("cpu")) is model.checkpoint
    assert transform.scheme(Precision()) == Scheme()
    assert transform.orders(None) == {}


def test_scheme_asks_for_outliers_and_keeps_the_precision():
    precision = Precision(QuantSpec(3), None, None)
    scheme = Atom(16, None).scheme(precision)
    assert (scheme.outliers, scheme.outlier_bits, scheme.hadamard) == (16, None, False)
    assert (scheme.weights, scheme.activations, scheme.kv) == (precision.weights, None, None)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0,), "transform.outliers"),
        ((-8,), "transform.outliers"),
        ((8, 1), "transform.outlier_bits"),
        ((8, 16), "null"),
    ],
)
def test_impossible_settings_name_their_key(arguments, key):
    with pytest.raises(ValueError, match=key):
        Atom(*arguments)
