"""What only a GPU can show; skipped without one. The last result on one is kept in benchmarks/RESULTS.md."""

import copy
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from bisup_lightning.calibrate.block_calibration import block_loss
from bisup_lightning.calibrate.captured_step import CapturedStep
from bisup_lightning.calibrate.measure import read_results
from bisup_lightning.cli import main
from bisup_lightning.evaluate.perplexity import final_hidden
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.job_config import trainer_factory
from bisup_lightning.model.block import learn_by_codes, quantize_layer
from bisup_lightning.model.blockwise import BlockwiseModel, run_layer
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.linear import InputQuantizer, QuantLinear
from bisup_lightning.model.theta import Theta, add_theta, theta_parameters
from bisup_lightning.quant.spec import Precision, QuantSpec, Scheme
from tests.inputs import DEMO
from tests.tools import BISUP, CutOff, contents, cut_off, with_callback

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
SAVING = "--trainer.callbacks=[{class_path: callbacks.checkpoint.BlockCheckpoint}]"  # and computing in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("transform", "solver"), [("none", "bisup"), ("quarot", "gptq"), ("quarot", "bisup"), ("atom", "bisup")]
)
def test_a_model_calibrated_on_a_gpu_reloads_bit_for_bit(make_checkpoint, fit, tmp_path, dtype, transform, solver):
    checkpoint = make_checkpoint("qwen2", dtype=dtype)
    configs = [f"--config=configs/transform/{transform}.yaml", f"--config=configs/solver/{solver}.yaml"]
    few = ["--transform.outliers=16"] if transform == "atom" else []
    run = fit(checkpoint, tmp_path / "run", *configs, *few, "--trainer.accelerator=gpu")
    results = read_results(run)
    assert results["peak_device_bytes"] > 0
    assert all(block["loss_final"] <= block["loss_initial"] for block in results["blocks"])
    model = AutoModelForCausalLM.from_pretrained(run / "model").to(CUDA)
    assert model.dtype == dtype  # the checkpoint's own
    ids = torch.randint(10, 8000, (4, 48), generator=torch.Generator().manual_seed(0))
    blockwise = open_quantized(run / "model", CUDA)
    hidden = final_hidden(blockwise, {"ids": ids}, [[0]], batch_size=4)[0]["ids"]
    with torch.no_grad():
        assert torch.equal(model(ids.to(CUDA)).logits, blockwise.head()(hidden.to(CUDA)))


def test_gpu_and_cpu_round_alike(make_checkpoint, fit, tmp_path):
    checkpoint = make_checkpoint("llama", dtype=torch.bfloat16)
    rounding = "--config=configs/solver/rtn.yaml"
    on_gpu, on_cpu = (
        read_results(fit(checkpoint, tmp_path / name, rounding, f"--trainer.accelerator={name}"))
        for name in ("gpu", "cpu")
    )
    for gpu_block, cpu_block in zip(on_gpu["blocks"], on_cpu["blocks"], strict=True):
        assert gpu_block["relative_mse"] == pytest.approx(cpu_block["relative_mse"], rel=0.1)


def test_the_bundled_model_loses_less_by_bisup_than_by_rounding(fit, text_file, tmp_path):
    more = ("--trainer.accelerator=gpu", "--data.num_samples=32", "--data.seq_len=128")
    excess = {}
    for solver in ("rtn", "bisup"):
        run = fit(DEMO, tmp_path / solver, f"--config=configs/solver/{solver}.yaml", *more)
        excess[solver] = next(iter(read_results(run)["perplexity"].values()))["kl"]
    assert excess["bisup"] < 0.8 * excess["rtn"]


def step_of_the_bundled_model(dtype, group_size=64, hadamard=False, by_codes=False):
    """The second block with Θ as it might be while it learns, and what a step is made of besides."""
    model = BlockwiseModel(DEMO, CUDA, dtype, fused_attention=True)
    quantizer, kv_quantizer = QuantSpec(4, group_size=group_size), QuantSpec(4, symmetric=False, granularity="head")
    scheme = Scheme.of(Precision(quantizer, quantizer, kv_quantizer), hadamard=hadamard)
    ids = torch.randint(10, 8000, (4, 128), generator=torch.Generator().manual_seed(0))
    hidden, prompt_hidden = model.embed(ids).to(CUDA), model.embed(torch.tensor([[0]]))
    for index in range(2):
        full, positions = model.layer(index), model.positions(index, 128, 1)
        prompt_hidden, prompt = model.encode_prompt(index, full, prompt_hidden)
        entered = hidden
        with torch.no_grad():
            hidden = run_layer(full, hidden, positions, BlockKV(None, prompt))
    layer = quantize_layer(model.layer(1), scheme, model.family.config, 0.9, torch.bfloat16)
    add_theta(layer, Theta(smoothing_start="ones"), torch.Generator().manual_seed(0))
    theta = theta_parameters(layer)
    generator = torch.Generator(CUDA).manual_seed(1)
    with torch.no_grad():
        for name, tensor in theta.items():
            if name.endswith("low_rank_b"):
                tensor.normal_(generator=generator).mul_(0.01)
    kv = BlockKV(KVQuantizer.of(scheme).prepare(model.family.head_dim, CUDA), prompt)
    learn_by_codes(layer, on=by_codes)
    quantizers = [module for module in layer.modules() if isinstance(module, InputQuantizer)]
    assert [module.with_codes for module in quantizers] == [by_codes] * 4
    return theta, layer, entered, hidden, positions, kv


def gradients_of_a_step(dtype, function, *arguments, **more):
    """Gradients of Θ, the same whatever the dtype."""
    theta, *given = step_of_the_bundled_model(dtype, *arguments, **more)
    return dict(zip(theta, torch.autograd.grad(function(*given), list(theta.values())), strict=True))


def distances(found, exact):
    return {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


@pytest.mark.parametrize("hadamard", [False, True])
def test_a_compiled_step_is_as_close_to_float32_as_an_eager_one(hadamard):
    """Rounding to a grid blows the digits up that bfloat16 loses, in both alike; in float32 the two agree."""
    torch.compiler.reset()
    eager, compiled = block_loss.__wrapped__, block_loss
    exact = gradients_of_a_step(torch.float32, eager, hadamard=hadamard)
    wide = distances(gradients_of_a_step(torch.float32, compiled, hadamard=hadamard), exact)
    narrow, narrow_compiled = (
        distances(gradients_of_a_step(torch.bfloat16, step, hadamard=hadamard), exact) for step in (eager, compiled)
    )
    for name in exact:
        assert wide[name] < 0.02, name
        assert narrow_compiled[name] < 2 * narrow[name] + 0.05, name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper's tensor cores"
)
@pytest.mark.parametrize(
    ("group_size", "hadamard", "step"),
    [
        (None, False, block_loss.__wrapped__),
        (128, True, block_loss.__wrapped__),
        (None, True, block_loss),
        (128, False, block_loss),
    ],
)
def test_a_step_by_codes_is_as_close_to_float32_as_one_by_values(group_size, hadamard, step):
    torch.compiler.reset()  # one function has a few compiled forms, not as many as these tests want
    exact = gradients_of_a_step(torch.float32, block_loss.__wrapped__, group_size, hadamard)
    by_codes, by_values = (
        distances(gradients_of_a_step(torch.bfloat16, step, group_size, hadamard, codes), exact)
        for codes in (True, False)
    )
    for name in exact:
        assert by_codes[name] < 1.5 * by_values[name] + 0.05, name


@pytest.mark.parametrize("step", [block_loss.__wrapped__, block_loss], ids=["eager", "compiled"])
def test_a_captured_step_gives_the_same_bits_as_one_that_is_not(step):
    """Also of another block, whose tensors it is given."""
    torch.compiler.reset()
    theta, layer, x, target, positions, kv = step_of_the_bundled_model(torch.bfloat16, 128, by_codes=True)

    def found(layer, *given):
        value = step(layer, *given)
        return value.detach(), torch.autograd.grad(value, list(theta_parameters(layer).values()))

    _, before = found(layer, x, target, positions, kv)
    captured = CapturedStep(found, layer, positions, kv, x, target)
    assert captured.matches(x)
    assert not captured.matches(x[:2])
    other, other_kv = copy.deepcopy(layer), kv.copy()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other_kv.prompt):
            tensor.mul_(0.9)
        for linear in (module for module in other.modules() if isinstance(module, QuantLinear)):
            linear.weight.copy_(linear.weight.flip(0))
    for change, (block, prompt) in enumerate([(layer, kv), (layer, kv), (other, other_kv), (layer, kv)]):
        assert captured.fits(block, positions, prompt)
        captured.attach(block, prompt)
        (value, gradients), (replayed, others) = found(block, x, target, positions, prompt), captured(x, target)
        captured.detach()
        assert torch.equal(value, replayed)
        assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
        same = [torch.equal(one, first) for one, first in zip(gradients, before, strict=True)]
        assert all(same) if change == 0 else not any(same)
        x, target = x.flip(0), target.flip(1)
        with torch.no_grad():
            for parameter in theta.values():
                parameter.mul_(0.9)


def test_a_run_that_was_cut_off_ends_in_the_same_bytes(make_checkpoint, fit_arguments, tmp_path):
    """With deterministic algorithms, cut off inside a block and saved there; not promised for compiled blocks."""
    checkpoint = make_checkpoint("llama", dtype=torch.bfloat16)
    eager = "{class_path: callbacks.checkpoint.BlockCheckpoint, init_args: {every_n_seconds: 0}}"
    callbacks = f"[{{class_path: callbacks.bf16.BF16}}, {{class_path: callbacks.fuse.Fuse}}, {eager}]"

    def command(run):
        return fit_arguments(
            checkpoint, tmp_path / run, BISUP, "--solver.epochs=3", "--trainer.accelerator=gpu",
            "--trainer.deterministic=true", f"--trainer.callbacks={callbacks}", with_callback(CutOff),
        )  # fmt: skip

    try:
        assert main(command("whole")) == 0
        for step in (3, 9):
            cut_off(command(f"at-{step}"), step)
            assert main(command(f"at-{step}")) == 0
            assert contents(tmp_path / f"at-{step}" / "model") == contents(tmp_path / "whole" / "model")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_step_that_does_not_fit_is_taken_in_parts(fit, tmp_path, caplog):
    """With half of the memory that the run takes by itself: the same result, and it says so."""
    more = (BISUP, "--solver.epochs=2", "--trainer.accelerator=gpu", "--data.num_samples=128",
            "--data.batch_size=128", "--data.seq_len=256", "--evaluation.batch_size=1")  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    roomy = read_results(fit(DEMO, tmp_path / "roomy", *more))["blocks"]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(0.5 * torch.cuda.max_memory_allocated() / total)
    try:
        tight = read_results(fit(DEMO, tmp_path / "tight", *more))["blocks"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of device memory" in caplog.text
    assert all(block["micro_batch"] < 128 for block in tight)
    for block, roomy_block in zip(tight, roomy, strict=True):
        assert block["loss_final"] == pytest.approx(roomy_block["loss_final"], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("mode", ["data", "wavefront", "independent"])
def test_two_gpus_end_near_the_losses_of_one(make_checkpoint, fit, tmp_path, mode):
    """`data` takes the same steps; a `wavefront` and `independent` do so in the first block alone."""
    checkpoint = make_checkpoint("llama", dtype=torch.float32)
    more = (BISUP, "--solver.epochs=3", "--trainer.accelerator=gpu", SAVING)
    one = read_results(fit(checkpoint, tmp_path / "one", *more))["blocks"]
    shared = (f"--parallel.mode={mode}", "--trainer.devices=2")
    two = read_results(fit(checkpoint, tmp_path / "two", *more, *shared))["blocks"]
    assert all(block["loss_final"] <= block["loss_initial"] for block in two)
    for block_of_two, block in zip(two if mode == "data" else two[:1], one, strict=mode == "data"):
        assert block_of_two["loss_final"] == pytest.approx(block["loss_final"], rel=0.02)


class Begun(LightningModule):
    """Sees whether the GPU is still busy when a training begins."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2, device=CUDA)

    def training_step(self, batch):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())

    def on_train_start(self):
        self.was_busy = not torch.cuda.current_stream(CUDA).query()


def test_a_training_begins_while_the_gpu_is_busy():
    """Or the GPU would wait in turn, for the first step."""
    settings = Namespace(logger=False, callbacks=None, devices=1, accelerator="gpu")
    make_trainer = trainer_factory(settings, [], Path(), CUDA)
    batches = DataLoader([torch.ones(2, 2, device=CUDA)] * 2, batch_size=None)
    make_trainer(0, 1).fit(Begun(), batches)  # imports what it needs
    trainer, module = make_trainer(1, 1), Begun()
    torch.cuda.synchronize(CUDA)
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    trainer.fit(module, batches)
    assert module.was_busy
