"""GPTQ on every linear of the bundled model."""

import pytest
import torch

from bisup_lightning.model.blockwise import BlockwiseModel, run_layer
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.model.kv import BlockKV
from bisup_lightning.quant.affine import dequantize, quantize
from bisup_lightning.quant.clipping import search_weight_clip
from bisup_lightning.quant.gptq import ClippedSegment, accumulate_hessian, gptq_quantize
from bisup_lightning.quant.spec import QuantSpec
from tests.inputs import DEMO

LENGTH = 256


class Watch:
    """Adds what a linear reads to its Hessian."""

    def __init__(self, hessian):
        self.hessian = hessian

    def __call__(self, module, inputs):
        accumulate_hessian(self.hessian, inputs[0].flatten(0, -2))


@pytest.fixture(scope="module")
def linears():
    """Name, weight [O, I] and Hessian [I, I] of each linear, from random tokens through the full-precision model."""
    model = BlockwiseModel(DEMO, torch.device("cpu"), torch.float32)
    ids = torch.randint(2, 8192, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden, found = model.embed(ids), []
    with torch.no_grad():
        for index, layer in model.layers():
            for entry in LINEAR_INPUTS:
                size = layer.get_submodule(entry.linears[0]).weight.shape[1]
                hessian = torch.zeros(size, size)
                layer.get_submodule(entry.linears[0]).register_forward_pre_hook(Watch(hessian))
                found += [(f"{index}.{name}", layer.get_submodule(name).weight, hessian) for name in entry.linears]
            hidden = run_layer(layer, hidden, model.positions(index, LENGTH, 0), BlockKV())
    return found


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, group_size=128), QuantSpec(3, group_size=128)], ids=str)
def test_the_layer_error_is_at_or_below_roundings(linears, spec):
    """Error of the output, tr((W − Ŵ) H (W − Ŵ)ᵀ), with the same clip values."""

    def error(weight, rounded, hessian):
        difference = (weight - rounded).double()
        return (difference @ hessian.double() * difference).sum().item()

    for name, weight, hessian in linears:
        clip = search_weight_clip(weight, spec)
        (solved,) = gptq_quantize(weight, hessian, [ClippedSegment(weight.shape[1], spec, clip)])
        rounded = dequantize(*quantize(weight, spec, clip))
        assert error(weight, solved.dequantize(), hessian) <= error(weight, rounded, hessian), name
