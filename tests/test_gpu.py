"""What only a GPU can show; skipped without one. The last result on one is kept in benchmarks/RESULTS.md."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bisup_lightning.calibrate.job import open_quantized, read_results
from bisup_lightning.evaluate.perplexity import final_hidden

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)


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
    demo = Path(__file__).parent.parent / "assets" / "demo"
    more = ("--trainer.accelerator=gpu", "--data.num_samples=32", "--data.seq_len=128")
    excess = {}
    for solver in ("rtn", "bisup"):
        run = fit(demo, tmp_path / solver, f"--config=configs/solver/{solver}.yaml", *more)
        excess[solver] = next(iter(read_results(run)["perplexity"].values()))["kl"]
    assert excess["bisup"] < 0.8 * excess["rtn"]
