"""Tiny random checkpoints of every supported family, written as a user's folder would be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bisup_lightning.cli import main

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "assets" / "demo"

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`make_checkpoint("qwen2", dtype=torch.bfloat16, max_shard_size="100KB", hidden_size=80, …)`: a folder."""

    def make(
        model_type: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **overrides
    ) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SMALL, **overrides})
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # not all ones, or folding would go untested
                    parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
                if name.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, folder / name)
        return folder

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some English-looking text of about twelve thousand tokens."""
    words = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    plain = sorted(word[1:] for word in words if word.startswith("Ġ") and word[1:].isalpha())
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(plain), (12_000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(plain[pick] for pick in picks), encoding="utf-8")
    return path


@pytest.fixture
def fit_arguments(text_file) -> Callable[..., list[str]]:
    """Arguments of a `fit` that takes seconds: `fit_arguments(checkpoint, run_dir, "--solver.epochs=1", …)`."""

    def arguments(checkpoint: Path, run_dir: Path, *more: str) -> list[str]:
        return [
            "--trust_classes_from=tests",
            "fit",
            f"--config={ROOT / 'configs' / 'base.yaml'}",
            f"--checkpoint={checkpoint}",
            f"--run_dir={run_dir}",
            f"--data.calibration={text_file}",
            "--data.num_samples=8",
            "--data.seq_len=32",
            "--data.batch_size=4",
            f"--evaluation.perplexity=[{text_file}]",
            "--evaluation.max_chunks=4",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            *more,
        ]

    return arguments


@pytest.fixture
def fit(fit_arguments) -> Callable[..., Path]:
    """Runs such a `fit`, which must succeed, and returns the run directory."""

    def run(checkpoint: Path, run_dir: Path, *more: str) -> Path:
        assert main(fit_arguments(checkpoint, run_dir, *more)) == 0
        return run_dir

    return run
