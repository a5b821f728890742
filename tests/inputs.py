"""What a `fit` of seconds starts from: tiny random checkpoints as a user's folder would be, a text, arguments."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def write_checkpoint(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides,
) -> Path:
    """A model of random weights with the bundled model's tokenizer."""
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


def write_text(path: Path) -> Path:
    """Some English-looking text of about twelve thousand tokens."""
    words = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    plain = sorted(word[1:] for word in words if word.startswith("Ġ") and word[1:].isalpha())
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(plain), (12_000,), generator=generator).tolist()
    path.write_text(" ".join(plain[pick] for pick in picks), encoding="utf-8")
    return path


def fit_command(checkpoint: Path, run_dir: Path, text: Path, *more: str) -> list[str]:
    """Arguments of such a `fit`; later ones win."""
    return [
        "--trust_classes_from=tests",
        "fit",
        f"--config={ROOT / 'configs' / 'base.yaml'}",
        f"--checkpoint={checkpoint}",
        f"--run_dir={run_dir}",
        f"--data.calibration={text}",
        "--data.num_samples=8",
        "--data.seq_len=32",
        "--data.batch_size=4",
        f"--evaluation.perplexity=[{text}]",
        "--evaluation.max_chunks=4",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        *more,
    ]
