"""Training one block through Lightning is AdamW on eq. 8, nothing more: judged by a loop written out by hand."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Trainer

from bisup_lightning.calibrate.block_calibration import BlockCalibration, Optimization
from bisup_lightning.data.datamodule import BlockBatches, BlockDataModule
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.data.share import WHOLE
from bisup_lightning.model.block import quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, run_layer
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.theta import Theta, add_theta, theta_parameters
from bisup_lightning.quant.spec import Precision, QuantSpec, Scheme
from tests.tools import Watch, with_callback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
CPU = torch.device("cpu")
SEED, EPOCHS, BATCH = 3, 3, 4
LEAST_CLIP = 1e-2


class Problem:
    """A quantized block with Θ, sequences before it (of seven, the last batch is partial), and their targets."""

    def __init__(self, folder, theta=None, count=7):
        model = BlockwiseModel(folder, CPU, torch.float32)
        scheme = Scheme.of(Precision(QuantSpec(3), QuantSpec(4)))
        self.positions = model.positions(0, 10, 0)
        self.kv = BlockKV(KVQuantizer.of(scheme))
        generator = torch.Generator().manual_seed(0)
        x_q = torch.randn(count, 10, model.family.hidden_size, generator=generator)
        self.inputs = LayerInputs(x_q + 0.01 * torch.randn(x_q.shape, generator=generator), x_q, CPU, BATCH)
        fp = model.layer(0)
        self.inputs.advance_fp(lambda x_BTD: run_layer(fp, x_BTD, self.positions, BlockKV()))
        self.layer = quantize_layer(model.layer(0), scheme, model.family.config, 0.9, torch.float32)
        add_theta(self.layer, theta or Theta(smoothing_start="ones", rank=4), generator)

    def data(self):
        return BlockDataModule(BlockBatches(self.inputs, BATCH, SEED))

    def train(self, optimization, attempt=0, epochs=EPOCHS, micro_batch=None, share=WHOLE, frugal=False):
        """Θ after Lightning has trained a copy of the block."""
        layer = copy.deepcopy(self.layer)
        steps = epochs * len(self.data().batches)
        module = BlockCalibration(
            layer, self.positions, self.kv, optimization, steps, attempt, micro_batch, share=share, frugal=frugal
        )
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, self.data())
        return theta_parameters(layer), trainer.callback_metrics["loss"].item()

    def train_by_hand(self, optimization, lr_scale=1.0, epochs=EPOCHS):
        """The same, written out."""
        layer, loader = copy.deepcopy(self.layer), self.data().train_dataloader()
        theta = theta_parameters(layer)
        optimizers = {}
        for name, tensor in theta.items():
            decay = optimization.weight_decay if kind(name) == "low_rank" else 0.0
            optimizers[name] = torch.optim.AdamW([tensor], weight_decay=decay, eps=1e-12)
        step, steps = 0, epochs * math.ceil(7 / BATCH)
        for _ in range(epochs):
            losses = []
            for x_BTD, target_BTD in loader:
                difference = run_layer(layer, x_BTD, self.positions, self.kv) - target_BTD
                loss = (difference * difference).mean()
                loss.backward()
                losses.append(loss.item() * len(x_BTD))
                remaining = (1 + math.cos(math.pi * step / steps)) / 2 if optimization.schedule == "cosine" else 1.0
                for name, optimizer in optimizers.items():
                    base = getattr(optimization, f"{kind(name)}_lr")
                    optimizer.param_groups[0]["lr"] = base * lr_scale * remaining
                    optimizer.step()
                    optimizer.zero_grad()
                with torch.no_grad():
                    for name, tensor in theta.items():
                        if kind(name) == "clip":
                            tensor.clamp_(min=LEAST_CLIP)
                step += 1
        assert step == steps
        return theta, sum(losses) / 7


def kind(name):
    (found,) = [word for word in ("clip", "smoothing", "low_rank") if word in name.split("proj.")[-1]]
    return found


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(num_hidden_layers=1)


@pytest.fixture(scope="module")
def problem(folder):
    return Problem(folder)


def assert_same_theta(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("attempt", [0, 1])
def test_lightning_does_what_the_loop_by_hand_does(problem, schedule, attempt):
    """The second try has a tenth of every learning rate."""
    optimization = Optimization(0.01, 0.004, 0.002, weight_decay=0.1, schedule=schedule)
    found, loss = problem.train(optimization, attempt)
    expected, expected_loss = problem.train_by_hand(optimization, 0.1**attempt)
    assert_same_theta(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    moved = {kind(name) for name in found if not torch.equal(found[name], dict(problem.layer.named_parameters())[name])}
    assert moved == {"clip", "smoothing", "low_rank"}


@pytest.mark.parametrize("learned", ["clip", "smoothing", "low_rank"])
def test_each_rate_moves_its_own_tensors_and_no_others(problem, learned):
    """All other rates are zero; then only tensors of one kind may move, and every one of them does."""
    rates = {f"{name}_lr": 0.01 if name == learned else 0.0 for name in ("clip", "smoothing", "low_rank")}
    found, _ = problem.train(Optimization(**rates, schedule="constant"))
    start = dict(problem.layer.named_parameters())
    for name, tensor in found.items():
        assert torch.equal(tensor, start[name]) is (kind(name) != learned), name


def test_weight_decay_shrinks_the_low_rank_matrices_alone(problem):
    """At a rate so small that gradients hardly move anything else. B begins at zero and A does not."""
    plain, _ = problem.train(Optimization(1e-6, 1e-6, 1e-6, 0.0, "constant"), epochs=1)
    decayed, _ = problem.train(Optimization(1e-6, 1e-6, 1e-6, 1e4, "constant"), epochs=1)
    for name, tensor in plain.items():
        if name.endswith("low_rank_a"):
            torch.testing.assert_close(decayed[name], tensor * (1 - 1e-2) ** 2, rtol=1e-3, atol=1e-5)
        elif kind(name) != "low_rank":
            torch.testing.assert_close(decayed[name], tensor, rtol=0, atol=5e-6)


def test_clip_values_stay_positive_however_fast_they_learn(problem):
    found, _ = problem.train(Optimization(0.9, 0.9, 0.9, schedule="constant"), epochs=4)
    clips = {name: tensor for name, tensor in found.items() if kind(name) == "clip"}
    assert any((tensor < 0.1).any() for tensor in clips.values())  # they did fall
    for name, tensor in clips.items():
        assert (tensor >= LEAST_CLIP).all(), name


def test_smoothing_and_low_rank_may_have_any_sign(problem):
    """Only clip values are held above zero."""
    found, _ = problem.train(Optimization(low_rank_lr=0.05, smoothing_lr=0.9, schedule="constant"), epochs=4)
    assert any((tensor < 0).any() for name, tensor in found.items() if kind(name) == "smoothing")
    assert all((tensor < 0).any() for name, tensor in found.items() if kind(name) == "low_rank")


def test_training_lowers_the_loss_on_all_data(problem):
    """Judged apart from the training loop, over the whole stream."""
    run = {}
    for name, epochs in (("start", 0), ("trained", 8)):
        layer = copy.deepcopy(problem.layer)
        if epochs:
            module = BlockCalibration(layer, problem.positions, problem.kv, Optimization(), 8)
            Trainer(
                max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(module, problem.data())  # fmt: skip
        run[name] = problem.inputs.outputs_q(lambda x, layer=layer: run_layer(layer, x, problem.positions, problem.kv))[
            1
        ]
    assert run["trained"] < 0.95 * run["start"]


def test_the_frozen_weights_stay_as_they_were(problem):
    before = {name: tensor.clone() for name, tensor in problem.layer.named_buffers()}
    before |= {name: value.clone() for name, value in problem.layer.named_parameters() if not value.requires_grad}
    module = BlockCalibration(copy.deepcopy(problem.layer), problem.positions, problem.kv, Optimization(), 8)
    Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, problem.data())  # fmt: skip
    after = dict(module.layer.named_buffers()) | dict(module.layer.named_parameters())
    assert any("norm.norm.weight" in name for name in before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_rates_reach_the_optimizer_from_the_command_line(folder, fit, tmp_path):
    Watch.fresh()
    fit(
        folder, tmp_path / "run", with_callback(Watch), "--solver.epochs=1", "--solver.optimization.schedule=constant",
        "--solver.optimization.clip_lr=0.003", "--solver.optimization.smoothing_lr=0.002",
        "--solver.optimization.low_rank_lr=0.001",
    )  # fmt: skip
    (rates,) = Watch.rates
    assert {kind(name) for name in rates} == {"clip", "smoothing", "low_rank"}
    for name, rate in rates.items():
        assert rate == {"clip": 0.003, "smoothing": 0.002, "low_rank": 0.001}[kind(name)], name
