"""One compiled graph serves all blocks of a model, without a break in it."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bisup_lightning.calibrate.block_calibration import block_loss
from bisup_lightning.model.block import fuse_layer, hold_dense, quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, run_layer, run_layer_fast
from bisup_lightning.model.family import linear_inputs
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.statistics import InputStatistics
from bisup_lightning.model.theta import Theta, add_theta, theta_parameters
from bisup_lightning.quant.spec import Precision, QuantSpec, Scheme

CPU = torch.device("cpu")
KV = QuantSpec(4, symmetric=False, granularity="head")
SCHEMES = {
    "row": Scheme(QuantSpec(4), QuantSpec(4), KV),
    "groups": Scheme(QuantSpec(3, group_size=16), QuantSpec(3, group_size=16), KV),
    "hadamard": Scheme.of(Precision(QuantSpec(4), QuantSpec(4), KV), hadamard=True),
    "outliers": Scheme.of(Precision(QuantSpec(4), QuantSpec(4), KV), outliers=16),
}


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return BlockwiseModel(make_checkpoint("qwen3", num_hidden_layers=3), CPU, fused_attention=True)


@pytest.fixture
def compiled():
    """The compiled form of a function, and how often it was compiled."""

    def compile_whole(function):
        counter = CompileCounterWithBackend("aot_eager")
        return torch.compile(function.__wrapped__, backend=counter, fullgraph=True, dynamic=False), counter

    torch._dynamo.reset()
    yield compile_whole
    torch._dynamo.reset()


def prompt_of(model, index, length):
    hidden = model.embed(torch.arange(10, 10 + length)[None])
    return model.encode_prompt(index, model.layer(index), hidden)[1] if length else None


def quantized(model, index, scheme):
    layer = model.layer(index)
    widths = {entry.name: linears[0].weight.shape[1] for entry, linears in linear_inputs(layer)}
    orders = {name: torch.arange(width).flip(0) for name, width in widths.items()} if scheme.outliers else None
    return quantize_layer(layer, scheme, model.family.config, 0.9, torch.float32, orders)


def test_what_will_be_compiled_does_not_load_the_compiler():
    code = "import sys, bisup_lightning.model.linear; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "prompt_length"),
    [
        ("groups", 1),
        ("hadamard", 5),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("row", 0), ("outliers", 1))),
    ],
)
def test_a_training_step_of_every_block_is_one_graph(model, compiled, name, prompt_length):
    """Loss and gradients of the eager step, from one compilation."""
    scheme, (step, counter) = SCHEMES[name], compiled(block_loss)
    x_BTD, target_BTD = torch.randn(2, 2, 12, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    for index in range(2):
        layer = quantized(model, index, scheme)
        add_theta(layer, Theta(rank=4, smoothing_start="ones"), torch.Generator().manual_seed(0))
        positions = model.positions(index, 12, prompt_length)
        kv = BlockKV(KVQuantizer.of(scheme), prompt_of(model, index, prompt_length))
        found, expected = (
            torch.autograd.grad(loss, list(theta_parameters(layer).values()))
            for loss in (
                step(layer, x_BTD, target_BTD, positions, kv),
                block_loss(layer, x_BTD, target_BTD, positions, kv),
            )
        )
        for gradient, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["groups", "hadamard"])
def test_forward_passes_of_every_block_are_one_graph(model, compiled, name):
    scheme, (run, counter) = SCHEMES[name], compiled(run_layer_fast)
    x_BTD = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index in range(3):
            layer = hold_dense(fuse_layer(quantized(model, index, scheme)), torch.float32)
            positions = model.positions(index, 12, 1)
            kv = BlockKV(KVQuantizer.of(scheme), prompt_of(model, index, 1))
            torch.testing.assert_close(run(layer, x_BTD, positions, kv), run_layer(layer, x_BTD, positions, kv))
    assert counter.frame_count == 1


def test_an_observed_full_precision_pass_is_one_graph(model, compiled):
    run, counter = compiled(run_layer_fast)
    x_BTD = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for index in range(3):
            layer, plain = model.layer(index), model.layer(index)
            statistics, positions = InputStatistics(layer), model.positions(index, 12, 0)
            found = run(layer, x_BTD, positions, BlockKV())
            statistics.add_pass()
            torch.testing.assert_close(found, run_layer(plain, x_BTD, positions, BlockKV()))
            normed_TD = plain.input_layernorm(x_BTD).flatten(0, 1)
            torch.testing.assert_close(statistics.square_sum["attention_input"], normed_TD.square().sum(0))
            torch.testing.assert_close(statistics.absmax["attention_input"], normed_TD.abs().amax(0))
    assert counter.frame_count == 1


@pytest.mark.parametrize("prompt_length", [0, 1, 5])
def test_fused_attention_is_attention_with_a_mask(model, prompt_length):
    masked = BlockwiseModel(model.checkpoint.folder, CPU)
    x_BTD = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    kv = BlockKV(None, prompt_of(model, 0, prompt_length))
    fused = run_layer(model.layer(0), x_BTD, model.positions(0, 12, prompt_length), kv)
    plain = run_layer(masked.layer(0), x_BTD, masked.positions(0, 12, prompt_length), kv)
    assert model.positions(0, 12, prompt_length).mask is None
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
