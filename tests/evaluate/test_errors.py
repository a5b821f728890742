"""Errors and attention block by block are those of whole models, judged by transformers' own hidden states."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bisup_lightning.cli import main
from bisup_lightning.evaluate.errors import HiddenErrors, attention_maps, hidden_errors
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.model.blockwise import BlockwiseModel
from tests.report.test_page import Elements
from tests.tools import RTN

CPU = torch.device("cpu")
NO_PROMPT = "--prompt.kind=none"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=3)


def tokens(count=5, length=12, seed=0):
    return torch.randint(2, 8192, (count, length), generator=torch.Generator().manual_seed(seed))


def fp_model(folder):
    return BlockwiseModel(folder, CPU, torch.float32)


@torch.no_grad()
def states_of(folder, ids_NT):
    """Behind every block, before the final norm, [L, N, T, D]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids_NT, use_cache=False)
    return torch.stack(seen).double()


def judged(folder, run, ids_NT, prompt):
    """Errors behind the prompt: the quantized model puts its own in front."""
    whole = torch.cat([torch.tensor([prompt]).long().expand(len(ids_NT), -1), ids_NT], 1)
    x = states_of(folder, whole)[:, :, len(prompt) :]
    y = states_of(run / "model", ids_NT)
    return HiddenErrors((y - x).square().mean((1, 3)), x.square().mean((1, 3)))


def assert_equal(found, expected):
    torch.testing.assert_close(found.error_LT, expected.error_LT, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.scale_LT, expected.scale_LT, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("prompt", "settings"), [([0], ()), ([], (NO_PROMPT,))], ids=["bos", "none"])
def test_errors_are_those_of_transformers(checkpoint, fit, tmp_path, prompt, settings):
    run, ids_NT = fit(checkpoint, tmp_path / "run", RTN, *settings), tokens()
    quantized = open_quantized(run / "model", CPU)
    found = hidden_errors(fp_model(checkpoint), quantized, ids_NT, prompt, batch_size=2)
    assert_equal(found, judged(checkpoint, run, ids_NT, prompt))
    assert (found.mse()[1:] > found.mse()[:-1]).all()  # errors add up


def test_a_quantized_prompt_is_what_a_run_without_prompt_makes_of_it(checkpoint, fit, tmp_path):
    """Rounding ignores the prompt, so that both runs hold the same weights."""
    exact = open_quantized(fit(checkpoint, tmp_path / "exact", RTN) / "model", CPU)
    without = open_quantized(fit(checkpoint, tmp_path / "without", RTN, NO_PROMPT) / "model", CPU)
    ids_NT, fp = tokens(), fp_model(checkpoint)
    found = hidden_errors(fp, exact, ids_NT, [0], 4, prompt_exact=False)
    whole = torch.cat([torch.zeros(len(ids_NT), 1, dtype=torch.long), ids_NT], 1)
    expected = hidden_errors(fp, without, whole, [], 4)
    assert torch.equal(found.error_LT, expected.error_LT[:, 1:])
    assert torch.equal(found.scale_LT, expected.scale_LT[:, 1:])
    assert not torch.equal(found.error_LT, hidden_errors(fp, exact, ids_NT, [0], 4).error_LT)


def test_rotated_models_are_compared_in_their_own_basis(checkpoint, fit, tmp_path):
    """At 8 bits what is left is small; against the model before its rotation, it would be as large as the states."""
    eight = [f"--precision.{place}.bits=8" for place in ("weights", "activations", "kv")]
    run = fit(checkpoint, tmp_path / "run", RTN, "--transform=bisup_lightning.transform.rotate.QuaRot", *eight)
    assert main(["analyze", f"--run_dir={run}", "--chunks=4", "--accelerator=cpu"]) == 0
    sets = json.loads((run / "analysis.json").read_text(encoding="utf-8"))["sets"]
    assert len(sets) == 2
    for figures in sets.values():
        assert 0 < max(figures["relative_mse"]) < 0.01


def test_a_model_differs_from_itself_by_nothing(checkpoint):
    for prompt_exact in (True, False):
        found = hidden_errors(fp_model(checkpoint), fp_model(checkpoint), tokens(), [0, 7], 2, prompt_exact)
        assert found.error_LT.shape == (3, 12)
        assert not found.error_LT.any()


def test_figures_by_definition():
    error_LT, scale_LT = torch.tensor([[[1.0, 3], [4, 8]], [[10, 10], [8, 40]]], dtype=torch.float64)
    errors = HiddenErrors(error_LT, scale_LT)
    assert errors.mse().tolist() == [2.0, 6.0]
    assert errors.relative_mse().tolist() == [0.2, 0.25]
    assert errors.by_position().tolist() == [0.5, 0.2]


@pytest.mark.parametrize("prompt", [[0, 7], []], ids=["prompt", "none"])
def test_attention_of_full_precision_is_that_of_transformers(checkpoint, prompt):
    ids_NT = tokens(3, 9)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    whole = torch.cat([torch.tensor([prompt]).long().expand(3, -1), ids_NT], 1)
    with torch.no_grad():
        judge = [weights.mean((0, 1))[len(prompt) :] for weights in model(whole, output_attentions=True).attentions]
    found = attention_maps(fp_model(checkpoint), ids_NT, prompt, [0, 2])
    for map_TK, expected_TK in zip(found, (judge[0], judge[2]), strict=True):
        torch.testing.assert_close(map_TK, expected_TK, rtol=1e-4, atol=1e-6)


def test_attention_of_a_quantized_model_sums_to_one_and_never_looks_ahead(checkpoint, fit, tmp_path):
    run = fit(checkpoint, tmp_path / "run", RTN)
    (map_TK,) = attention_maps(open_quantized(run / "model", CPU), tokens(3, 9), [0], [2])
    assert map_TK.shape == (9, 10)
    torch.testing.assert_close(map_TK.sum(1), torch.ones(9))
    assert not map_TK[:, 1:].triu(1).any()
    (exact_TK,) = attention_maps(fp_model(checkpoint), tokens(3, 9), [0], [2])
    assert not torch.equal(map_TK, exact_TK)


def test_analyze_adds_to_the_report(checkpoint, fit, tmp_path):
    run = fit(checkpoint, tmp_path / "run", RTN)
    before = (run / "report.html").read_text(encoding="utf-8")
    assert main(["analyze", f"--run_dir={run}", "--chunks=8", "--accelerator=cpu"]) == 0
    analysis = json.loads((run / "analysis.json").read_text(encoding="utf-8"))
    blocks = json.loads((run / "results.json").read_text(encoding="utf-8"))["blocks"]
    calibration = analysis["sets"]["calibration"]
    assert calibration["mse"] == pytest.approx([block["mse"] for block in blocks], rel=1e-4)
    assert calibration["relative_mse"] == pytest.approx([block["relative_mse"] for block in blocks], rel=1e-4)
    assert calibration["by_position"].keys() == {"prompt_exact", "prompt_quantized"}
    assert analysis["attention"]["blocks"] == [0, 1, 2]
    after = (run / "report.html").read_text(encoding="utf-8")
    for words in ("Error along the text", "attention weight"):
        assert words not in before
        assert words in after
    Elements(after)


def test_analyze_refuses_what_it_cannot_use(checkpoint, fit, tmp_path, capsys):
    assert main(["analyze", f"--run_dir={tmp_path / 'nothing'}"]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert main(["analyze", f"--run_dir={tmp_path}", "--chunks=0"]) == 2
    assert "chunks must be at least 1" in capsys.readouterr().err
