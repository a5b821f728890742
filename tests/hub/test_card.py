"""The card in a run's model/ folder says what the model is, to the hub and to people."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from bisup_lightning.cli import main
from bisup_lightning.hub.card import CARD, model_card
from bisup_lightning.model import checkpoint as checkpoints
from bisup_lightning.quant.spec import QuantSpec, Scheme
from bisup_lightning.report.run import precision_name
from tests.hub.conftest import RUNS
from tests.inputs import ROOT
from tests.tools import RTN


def card_of(folder):
    """The metadata and the lines of a checkpoint's card, which lies nowhere but in its folder."""
    card = ModelCard(model_card("someone/model", folder, Scheme(), "NoTransform", "RTN", ""))
    return card.data.to_dict(), card.text.splitlines()


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_card_says_what_it_is(run_of, load, name):
    run_dir = run_of(name)
    settings = json.loads((run_dir / "manifest.json").read_text())["fingerprint"]
    card = ModelCard.load(run_dir / "model" / CARD)
    lines = card.text.splitlines()
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["bisup", "quantized"]}  # it is on no hub
    for part in ("transform", "solver"):
        assert f"- {part}: {settings[f'{part}.class_path'].rsplit('.', 1)[-1]}" in lines
    assert any(line.startswith(f"- precision: {precision_name(settings)} ") for line in lines)
    assert "- checkpoint: a local checkpoint" in lines
    bos = "    <|begin_of_text|>"
    prompt = {"text": f"{bos}A quiet sentence.", "bos": bos, "none": "No prompt stands in front of its inputs."}
    assert prompt[settings["prompt.kind"]] in lines


def test_what_the_card_tells_to_run_loads_the_model(run_of):
    folder = run_of("llama, bisup, text prompt") / "model"
    code = (folder / CARD).read_text().split("```python\n")[1].split("```")[0]
    script = code.replace("path/to/this/folder", str(folder)) + "print(model.prompt_kv.ids.tolist())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == AutoModelForCausalLM.from_pretrained(folder).prompt_kv.ids.tolist()


def test_a_checkpoint_of_the_hub_is_named_with_its_license(make_checkpoint, fit, tmp_path, monkeypatch):
    fetched = shutil.copytree(make_checkpoint(), tmp_path / "fetched")
    (fetched / CARD).write_text("---\nlicense: other\nlicense_name: llama-x\nlanguage: en\n---\nlicense: mit\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, allow_patterns: fetched)
    assert CARD in checkpoints.WANTED
    run_dir = fit("someone/model", tmp_path / "run", RTN)
    card = ModelCard.load(run_dir / "model" / CARD)
    assert card.data.to_dict() == {
        "base_model": "someone/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "other",
        "license_name": "llama-x",
        "tags": ["bisup", "quantized"],
    }
    assert "- checkpoint: someone/model" in card.text.splitlines()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"license: mit\n",
        b"---\nlanguage: en\n---\nlicense: mit\n",
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense:\n- mit\n---\n",
        b"---\nlicense: \xff\n---\n",
    ],
)
def test_a_card_that_tells_no_license(tmp_path, text):
    """Whatever stands in it instead is not taken for one, and does not end the run."""
    (tmp_path / CARD).write_bytes(text)
    assert card_of(tmp_path)[0].keys() == {"base_model", "base_model_relation", "library_name", "tags"}


def test_a_prompt_of_several_lines_stays_apart(tmp_path):
    prompt = "<|im_start|>system\n```\n# {loud}<|im_end|>\n"
    text = model_card("someone/model", tmp_path, Scheme(), "NoTransform", "RTN", prompt)
    assert "\n\n    <|im_start|>system\n    ```\n    # {loud}<|im_end|>\n\n" in text


def test_the_name_of_a_precision():
    assert Scheme().name == "W4A4KV4"
    assert Scheme(QuantSpec(3, group_size=128), None, None).name == "W3A16KV16-g128"


def test_without_its_card_a_model_is_put_together_again(run_of, tmp_path):
    """To the same bytes."""
    whole = run_of("llama, rtn, stored bfloat16")
    run_dir = shutil.copytree(whole, tmp_path / "run")
    wanted = (run_dir / "model" / CARD).read_bytes()
    (run_dir / "model" / CARD).unlink()
    assert main(["fit", f"--config={run_dir / 'config.yaml'}", f"--run_dir={run_dir}"]) == 0
    assert (run_dir / "model" / CARD).read_bytes() == wanted
