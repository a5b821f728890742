"""Processes that share every batch learn the Θ of one: to the order of a sum, and to the same bits among themselves."""

import pytest
import torch

from bisup_lightning.calibrate.block_calibration import Optimization
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.share import Share
from tests.calibrate.test_block_calibration import BATCH, CPU, Problem
from tests.ranks import together


def train(rank, world, folder, micro_batch):
    problem = Problem(folder, count=8)
    share, inputs = Share(rank, world), problem.inputs
    problem.inputs = LayerInputs(share.of(inputs.fp, BATCH), share.of(inputs.q, BATCH), CPU, BATCH, share=share)
    theta, loss = problem.train(Optimization(), micro_batch=micro_batch, share=share)
    return {name: tensor.detach() for name, tensor in theta.items()}, loss


@pytest.mark.parametrize(("world", "micro_batch"), [(2, None), (4, None), (2, 1)])
def test_members_learn_the_theta_of_one_process(make_checkpoint, tmp_path, world, micro_batch):
    folder = make_checkpoint(num_hidden_layers=1)
    whole, loss = Problem(folder, count=8).train(Optimization())
    first, *others = together(world, tmp_path, train, folder, micro_batch)
    for name, tensor in whole.items():
        torch.testing.assert_close(first[0][name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert first[1] == pytest.approx(loss, rel=1e-5)
    for theta, other_loss in others:
        assert all(torch.equal(theta[name], tensor) for name, tensor in first[0].items())
        assert other_loss == first[1]
