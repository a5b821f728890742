"""Finished runs that between them cover families, transforms, solvers, precisions, prompts and dtypes."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bisup_lightning.cli import main
from tests.inputs import ROOT

QUAROT, ATOM, GPTQ, RTN, BISUP = (
    [f"--config={ROOT / 'configs' / part}"]
    for part in (
        "transform/quarot.yaml",
        "transform/atom.yaml",
        "solver/gptq.yaml",
        "solver/rtn.yaml",
        "solver/bisup.yaml",
    )
)
ATOM = [*ATOM, "--transform.init_args.outliers=8"]
BISUP = [*BISUP, "--solver.init_args.epochs=1", "--solver.init_args.theta.rank=4"]
GROUPS = ["--precision.weights.group_size=8", "--precision.activations.group_size=8"]
W3A3 = ["--precision.weights.bits=3", "--precision.activations.bits=3", "--precision.kv.bits=3"]
TEXT_PROMPT = ["--prompt.kind=text", "--prompt.text=A quiet sentence."]


@dataclass(frozen=True)
class Run:
    """What is quantized and how."""

    kind: str
    arguments: list[str]
    overrides: dict = field(default_factory=dict)


SIX_HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
RUNS = {
    "llama, rtn, stored bfloat16": Run("llama", RTN, {"dtype": torch.bfloat16, "tie_word_embeddings": True}),
    "llama, bisup, text prompt": Run("llama", [*BISUP, *TEXT_PROMPT, "--precision.kv.granularity=token"]),
    "llama, quarot, gptq, six heads, biases, tied": Run(
        "llama",
        [*QUAROT, *GPTQ],
        {**SIX_HEADS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2, atom, gptq, groups": Run("qwen2", [*ATOM, *GPTQ, *GROUPS], {"max_shard_size": "100KB"}),
    "qwen2, quik, bisup, stored float16": Run(
        "qwen2", [*ATOM, "--transform.init_args.outlier_bits=null", *BISUP], {"dtype": torch.float16}
    ),
    "qwen3, quarot, bisup, w3a3": Run("qwen3", [*QUAROT, *BISUP, *W3A3], {"head_dim": 32}),
    "mistral, quarot, rtn, window": Run("mistral", [*QUAROT, *RTN], {"sliding_window": 8}),
    "qwen3, weights only, no prompt": Run(
        "qwen3", [*RTN, "--precision.activations=null", "--precision.kv=null", "--prompt.kind=none"]
    ),
}
_FINISHED: dict[str, Path] = {}


@pytest.fixture
def run_of(make_checkpoint, fit_arguments, tmp_path_factory):
    """The run directory of one of RUNS, made once."""

    def directory(name):
        if name not in _FINISHED:
            run = RUNS[name]
            # weights large enough that tokens are told apart and that rounding shows
            checkpoint = make_checkpoint(run.kind, **{"initializer_range": 0.15, **run.overrides})
            run_dir = tmp_path_factory.mktemp("run")
            assert main(fit_arguments(checkpoint, run_dir, *run.arguments)) == 0
            _FINISHED[name] = run_dir
        return _FINISHED[name]

    return directory


@pytest.fixture
def load():
    """A run's model as a user loads it."""

    def loaded(run_dir, **options):
        return AutoModelForCausalLM.from_pretrained(run_dir / "model", **options).eval()

    return loaded
