"""Perplexity block by block is that of the whole model, judged by transformers and torchmetrics."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from bisup_lightning import cli
from bisup_lightning.data.corpus import evaluation_tokens
from bisup_lightning.evaluate.perplexity import evaluate
from bisup_lightning.model.blockwise import BlockwiseModel
from tests.inputs import DEMO, ROOT
from tests.tools import RTN

CPU = torch.device("cpu")
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext2" / "wiki.test.raw"
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


def measure(folder, *arguments):
    """Figures of a `test`."""
    output = folder / "figures.json"
    assert cli.main(["test", "--accelerator=cpu", f"--output={output}", *arguments]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def tokens(count=6, length=20, seed=0):
    return torch.randint(2, 8192, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def judged(folder, ids_NT, prompt=()):
    """Perplexity of the targets within the chunks, from transformers' own logits on prompt + chunk."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    judge = Perplexity()
    for chunk_1T in ids_NT.split(1):
        whole = torch.cat([torch.tensor([list(prompt)], dtype=torch.int64), chunk_1T], 1)
        logits = model(whole).logits[:, len(prompt) :]
        judge.update(logits[:, :-1], chunk_1T[:, 1:])
    return judge.compute().item()


def blockwise(folder):
    return BlockwiseModel(folder, CPU, torch.float32)


@pytest.mark.parametrize(("family", "settings"), FAMILIES.items(), ids=FAMILIES)
@pytest.mark.parametrize("prompt", [[0], [0, 17, 4], []], ids=["bos", "three", "none"])
def test_equals_transformers_and_torchmetrics(make_checkpoint, family, settings, prompt):
    """Behind a prompt, the prompt is context alone: T − 1 targets of the chunk, none for the prompt."""
    folder, ids_NT = make_checkpoint(family, **settings), tokens()
    figures = evaluate(blockwise(folder), None, {"set": ids_NT}, prompt, batch_size=4)["set"]
    assert figures["fp"] == pytest.approx(judged(folder, ids_NT), rel=1e-5)
    assert figures["fp_prompt"] == pytest.approx(judged(folder, ids_NT, prompt), rel=1e-5)
    assert ("fp_prompt" in figures, "quantized" in figures) == (True, False)
    if prompt:
        assert figures["fp_prompt"] != figures["fp"]


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="needs WikiText-2 beside the repository")
def test_the_demo_model_on_wikitext():
    """The first twenty chunks by the field's protocol, from the raw file to the number."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    whole = evaluation_tokens(str(WIKITEXT), tokenizer, 512, None)
    assert len(whole) == 687  # as shared/models/PERPLEXITY.md counts them, BOS in front of the first
    beginning = tokenizer(WIKITEXT.read_text(encoding="utf-8")[:100_000])["input_ids"]
    found, ids_NT = whole[:20], torch.tensor(beginning[: 20 * 512]).view(20, 512)
    assert torch.equal(found, ids_NT)
    figures = evaluate(blockwise(DEMO), None, {"wiki": found}, [], batch_size=8)["wiki"]
    assert figures["fp"] == pytest.approx(judged(DEMO, ids_NT), rel=1e-5)
    figures = evaluate(blockwise(DEMO), None, {"wiki": found[:4]}, [0], batch_size=8)["wiki"]
    assert figures["fp_prompt"] == pytest.approx(judged(DEMO, ids_NT[:4], [0]), rel=1e-5)
    assert figures["fp_prompt"] < 0.85 * figures["fp"]  # this model leans on its first token


@pytest.mark.parametrize("prompt", [[0], []])
def test_a_model_equals_itself(make_checkpoint, prompt):
    folder = make_checkpoint()
    figures = evaluate(blockwise(folder), blockwise(folder), {"set": tokens()}, prompt, 4)["set"]
    assert figures["kl"] == 0.0
    assert figures["top1"] == 1.0
    assert figures["quantized"] == figures["fp_prompt"]


def test_the_batch_size_does_not_matter(make_checkpoint):
    fp = blockwise(make_checkpoint())
    results = [evaluate(fp, None, {"set": tokens(7)}, [0], batch_size)["set"] for batch_size in (1, 3, 7, 64)]
    for result in results[1:]:
        assert result == {name: pytest.approx(value, rel=1e-6) for name, value in results[0].items()}


def test_sets_do_not_touch_each_other(make_checkpoint):
    """Several sets of different lengths in one pass over the blocks give what each gives alone."""
    fp = blockwise(make_checkpoint())
    sets = {"short": tokens(3, 8, 1), "long": tokens(5, 31, 2), "one": tokens(1, 16, 3)}
    together = evaluate(fp, None, sets, [0, 5], 4)
    assert list(together) == list(sets)
    for name, ids_NT in sets.items():
        assert together[name] == evaluate(fp, None, {name: ids_NT}, [0, 5], 4)[name]


def test_fewer_chunks_are_divided_by_what_they_summed(make_checkpoint):
    folder, ids_NT = make_checkpoint(), tokens(6)
    part = evaluate(blockwise(folder), None, {"set": ids_NT[:2]}, [0], 4)["set"]
    assert part["fp"] == pytest.approx(judged(folder, ids_NT[:2]), rel=1e-5)
    assert part["fp"] != pytest.approx(judged(folder, ids_NT), rel=1e-5)


def test_ids_are_left_as_they_are(make_checkpoint):
    ids_NT = tokens()
    before = ids_NT.clone()
    evaluate(blockwise(make_checkpoint()), None, {"set": ids_NT}, [0], 4)
    assert torch.equal(ids_NT, before)


# --- measured again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [(), ("--transform=bisup_lightning.transform.rotate.QuaRot",)], ids=["rtn", "quarot"]
)
def test_test_gives_the_numbers_of_the_run(make_checkpoint, fit, tmp_path, settings):
    run = fit(make_checkpoint(), tmp_path / "run", RTN, *settings)
    recorded = json.loads((run / "results.json").read_text(encoding="utf-8"))["perplexity"]
    assert measure(tmp_path, f"--run_dir={run}") == {"perplexity": recorded, "zero_shot": {}}
    (figures,) = recorded.values()
    assert figures.keys() == {"fp", "fp_prompt", "quantized", "kl", "top1", "word", "byte"}
    assert figures["kl"] > 0


def test_test_prints_the_table_of_the_run(make_checkpoint, fit, tmp_path, capsys):
    run = fit(make_checkpoint(), tmp_path / "run", RTN)
    fitted = capsys.readouterr().out
    assert cli.main(["test", f"--run_dir={run}", "--accelerator=cpu"]) == 0
    measured = capsys.readouterr().out
    assert measured.strip()
    assert measured in fitted


def test_test_measures_other_sets_of_a_run(make_checkpoint, fit, tmp_path, text_file):
    """Given sets replace the run's own; what is not given stays as it was in the run."""
    run = fit(make_checkpoint(), tmp_path / "run", RTN)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[5000:30000])
    measured = measure(tmp_path, f"--run_dir={run}", f"--evaluation.perplexity=[{text_file},{other}]")["perplexity"]
    recorded = json.loads((run / "results.json").read_text(encoding="utf-8"))["perplexity"]
    assert list(measured) == [text_file.name, other.name]
    assert measured[text_file.name] == recorded[text_file.name]
    assert measured[other.name]["fp"] != recorded[text_file.name]["fp"]


def test_test_of_a_checkpoint_is_that_of_the_run_over_it(make_checkpoint, fit, tmp_path, text_file):
    folder = make_checkpoint()
    run = fit(folder, tmp_path / "run", RTN)
    arguments = f"--evaluation.perplexity=[{text_file}]", "--evaluation.max_chunks=4", "--evaluation.seq_len=32"
    measured = measure(tmp_path, f"--checkpoint={folder}", *arguments)["perplexity"][text_file.name]
    recorded = json.loads((run / "results.json").read_text(encoding="utf-8"))["perplexity"][text_file.name]
    assert measured == {name: recorded[name] for name in ("fp", "fp_prompt")} | {
        unit: {name: recorded[unit][name] for name in ("fp", "fp_prompt")} for unit in ("word", "byte")
    }


def test_each_setting_that_is_given_replaces_the_runs_own(make_checkpoint, fit, tmp_path, monkeypatch):
    """Batches change no figure, lengths do; and whatever is not given stays."""
    run = fit(make_checkpoint(), tmp_path / "run", RTN, "--evaluation.seq_len=48")
    recorded = json.loads((run / "results.json").read_text(encoding="utf-8"))["perplexity"]
    (name,) = recorded
    asked, real = [], cli.evaluate_run

    def kept(job):
        asked.append(job.evaluation)
        return real(job)

    monkeypatch.setattr(cli, "evaluate_run", kept)
    batches = measure(tmp_path, f"--run_dir={run}", "--evaluation.batch_size=2")["perplexity"]
    for key in ("fp", "fp_prompt", "quantized"):
        assert batches[name][key] == pytest.approx(recorded[name][key], rel=1e-5)
    lengths = measure(tmp_path, f"--run_dir={run}", "--evaluation.seq_len=null", "--evaluation.max_chunks=2")
    assert lengths["perplexity"][name]["fp"] != pytest.approx(recorded[name]["fp"], rel=1e-3)
    assert [(one.batch_size, one.seq_len, one.max_chunks) for one in asked] == [(2, 48, 4), (8, None, 2)]


@pytest.mark.parametrize("given", ["--prompt.kind=none", "--seed=0"])
def test_what_a_run_has_of_its_own_can_not_be_given(make_checkpoint, fit, tmp_path, capsys, given):
    run = fit(make_checkpoint(), tmp_path / "run", RTN)
    capsys.readouterr()
    assert cli.main(["test", f"--run_dir={run}", "--accelerator=cpu", given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert given[2:6] in line
    assert "--checkpoint" in line


@pytest.mark.parametrize("command", ["test", "analyze"])
def test_a_run_is_measured_against_what_it_was_made_of(make_checkpoint, fit, tmp_path, capsys, command):
    folder = make_checkpoint()
    run = fit(folder, tmp_path / "run", RTN)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.1
    save_file(tensors, weights, {"format": "pt"})
    capsys.readouterr()
    assert cli.main([command, f"--run_dir={run}", "--accelerator=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"checkpoint: {weights} is not what {run} was made of" in line


def test_a_run_is_measured_from_elsewhere(make_checkpoint, fit, tmp_path, monkeypatch):
    """Though its checkpoint was named as seen from where it ran."""
    folder = make_checkpoint()
    monkeypatch.chdir(folder.parent)
    run = fit(Path(folder.name), tmp_path / "run", RTN)
    recorded = json.loads((run / "results.json").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    assert measure(tmp_path, f"--run_dir={run}")["perplexity"] == recorded["perplexity"]


@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_an_unknown_set_is_answered_with_the_known(make_checkpoint, fit, tmp_path, capsys, place):
    folder = make_checkpoint()
    given = f"--run_dir={fit(folder, tmp_path / 'run', RTN)}" if place == "run" else f"--checkpoint={folder}"
    capsys.readouterr()
    assert cli.main(["test", given, "--evaluation.perplexity=[wikitext3]", "--accelerator=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("evaluation.perplexity", "wikitext3", "wikitext2", "c4_new", ".jsonl"):
        assert word in line


def test_two_files_of_one_name_are_two_sets(make_checkpoint, fit, tmp_path, text_file):
    """…/a/text.txt and …/b/text.txt: neither may vanish behind the other."""
    other = tmp_path / "elsewhere" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text()[5000:30000])
    run = fit(make_checkpoint(), tmp_path / "run", RTN, f"--evaluation.perplexity=[{text_file},{other}]")
    figures = json.loads((run / "results.json").read_text(encoding="utf-8"))["perplexity"]
    assert len({value["fp"] for value in figures.values()}) == 2


# --- by word and by byte ----------------------------------------------------------------------------------------------


def test_words_and_bytes_share_the_likelihood_of_the_tokens():
    """By definition, exp of minus the log-likelihood over the number of words or bytes of what was predicted."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = "The river – as old as the garden – froze in winter, they say. " * 3
    ids_1T = torch.tensor([tokenizer(text)["input_ids"]])  # BOS first, which is not predicted
    assert tokenizer.decode(ids_1T[0, 1:]).strip() == text.strip()
    found = evaluate(blockwise(DEMO), None, {"set": ids_1T}, [], 8, tokenizer)["set"]
    log_likelihood = -math.log(judged(DEMO, ids_1T)) * (ids_1T.shape[1] - 1)
    assert found["word"]["fp"] == pytest.approx(math.exp(-log_likelihood / (3 * 14)), rel=1e-4)
    count = len(tokenizer.decode(ids_1T[0, 1:]).encode())
    assert found["byte"]["fp"] == pytest.approx(math.exp(-log_likelihood / count), rel=1e-4)
    assert found["word"].keys() == found["byte"].keys() == {"fp", "fp_prompt"}
