"""What passes through a block's linear inputs, channel by channel."""

import torch

from bisup_lightning.model.blockwise import run_layer
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.model.kv import BlockKV
from bisup_lightning.model.statistics import InputStatistics
from tests.model.tiny import family_of, full_precision_layer, positions_of, random_hidden, random_tensors


def test_figures_over_all_batches_are_those_of_all_tokens_at_once():
    """Against what each linear really read, gathered apart; batches may differ in size."""
    family = family_of("qwen3")
    layer = full_precision_layer(family, random_tensors(family, 0, torch.float32))
    statistics, read = InputStatistics(layer), {entry.name: [] for entry in LINEAR_INPUTS}
    for entry in LINEAR_INPUTS:
        layer.get_submodule(entry.linears[-1]).register_forward_pre_hook(
            lambda _, arguments, name=entry.name: read[name].append(arguments[0].flatten(0, 1))
        )
    with torch.no_grad():
        for seed, batch in ((0, 3), (1, 1)):
            x = random_hidden(seed, batch, 6, family.hidden_size, torch.float32)
            run_layer(layer, x, positions_of(family, 6, 0, torch.float32), BlockKV())
            statistics.add_pass()
    for name, parts in read.items():
        x = torch.cat(parts).double()
        assert len(x) == 24
        assert torch.equal(statistics.absmax[name].double(), x.abs().amax(0))
        torch.testing.assert_close(statistics.square_sum[name].double(), x.square().sum(0), rtol=1e-5, atol=0)


def test_narrow_activations_are_summed_in_float32():
    """In bfloat16 a sum over a few hundred tokens would stop growing."""
    family = family_of("llama")
    layer = full_precision_layer(family, random_tensors(family, 0, torch.bfloat16))
    statistics = InputStatistics(layer)
    x = random_hidden(0, 40, 32, family.hidden_size, torch.bfloat16)
    with torch.no_grad():
        normed = layer.input_layernorm(x).flatten(0, 1).double()
        run_layer(layer, x, positions_of(family, 32, 0, torch.bfloat16), BlockKV())
    statistics.add_pass()
    wanted = normed.square().sum(0)
    torch.testing.assert_close(statistics.square_sum["attention_input"].double(), wanted, rtol=1e-4, atol=0)
