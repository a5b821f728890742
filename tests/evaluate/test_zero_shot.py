"""Scores through lm-eval are those of plain HFLM, and of log-likelihoods summed by hand."""

import functools
import json
import math
import sys

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bisup_lightning import cli
from bisup_lightning.cli import main
from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.settings import Evaluation
from bisup_lightning.evaluate.zero_shot import (
    TASKS,
    check_zero_shot,
    devices_for,
    fetch_tasks,
    known_to_lm_eval,
    zero_shot,
)
from bisup_lightning.hub.load import load_behind_prompt, load_quantized
from tests.tools import RTN

CPU = torch.device("cpu")
WORDS = [
    "river",
    "stone",
    "cloud",
    "letter",
    "window",
    "garden",
    "number",
    "answer",
    "market",
    "winter",
    "summer",
    "paper",
]


def texts(count, words, seed):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, words), generator=generator)
    return [" ".join(WORDS[pick] for pick in row) for row in picks.tolist()]


ROW = '{"query": "x", "choices": ["a", "b"], "gold": 0}\n'


def choice_rows(count=24, question="{}"):
    queries, choices = texts(count, 6, 0), texts(3 * count, 3, 1)
    return [
        {"query": question.format(query), "choices": choices[3 * n : 3 * n + 3], "gold": n % 3}
        for n, query in enumerate(queries)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs requirements-zero-shot.txt")


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation, prompt=()):
    """Of a continuation behind prompt and context; the tokenizer puts its BOS before the text by itself."""
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    if prompt and whole[: len(prompt)] != list(prompt):
        whole, start = [*prompt, *whole], start + len(prompt)
    logs = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    targets = torch.tensor(whole[start:])
    at = logs[start - 1 : -1]
    return at.gather(1, targets[:, None]).sum().item(), bool((at.argmax(1) == targets).all())


def solved_by_hand(model, tokenizer, rows, normalize, prompt=()):
    solved = []
    for row in rows:
        scores = [log_likelihood(model, tokenizer, row["query"], " " + choice, prompt)[0] for choice in row["choices"]]
        if normalize:
            scores = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        solved.append(scores.index(max(scores)) == row["gold"])
    return solved


@pytest.mark.parametrize("prompt", [[], [0], [0, 17, 4]], ids=["none", "bos", "three"])
def test_scores_are_those_of_likelihoods_by_hand(lm_eval, checkpoint, tokenizer, tmp_path, prompt):
    rows = choice_rows()
    path = write_rows(tmp_path / "own.jsonl", rows)
    model = load_behind_prompt(checkpoint, prompt, torch.float32, CPU)
    score = zero_shot(lambda device: model, tokenizer, [path], None, 4, [CPU])["own"]
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    solved = solved_by_hand(plain, tokenizer, rows, True, prompt)
    share = sum(solved) / len(solved)
    assert (score.metric, score.documents) == ("acc_norm", 24)
    assert score.value == pytest.approx(share)
    assert 0 < share < 1
    assert score.stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(solved) - 1)))


@torch.no_grad()
def test_a_prompt_longer_than_a_window_stands_there_whole(make_checkpoint):
    """A text token by token behind it, and the two as one text, from a model that forgets what left the window."""
    folder = make_checkpoint("mistral", sliding_window=8)
    ids = torch.randint(10, 8192, (1, 24), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for length in (1, 7, 8, 20):
        model = load_behind_prompt(folder, ids[0, :length].tolist(), torch.float64, CPU)
        behind, expected = model(input_ids=ids[:, length:]).logits, plain(input_ids=ids).logits[:, length:]
        torch.testing.assert_close(behind, expected, rtol=0, atol=1e-9)


def test_full_precision_equals_plain_hflm_exactly(lm_eval, checkpoint, tokenizer, tmp_path):
    """All log-likelihoods, to the last bit: without a prompt nothing stands between lm-eval and the model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    requests = [
        Instance("loglikelihood", {}, (row["query"], " " + choice), n)
        for n, row in enumerate(choice_rows(8))
        for choice in row["choices"]
    ]
    plain = HFLM(pretrained=str(checkpoint), dtype=torch.float32, batch_size=4, device="cpu")
    model = load_behind_prompt(checkpoint, [], torch.float32, CPU)
    ours = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    assert ours.loglikelihood(requests, disable_tqdm=True) == plain.loglikelihood(requests, disable_tqdm=True)
    bos = HFLM(pretrained=load_behind_prompt(checkpoint, [0], torch.float32, CPU), tokenizer=tokenizer, batch_size=4)
    for (found, _), (expected, _) in zip(
        bos.loglikelihood(requests, disable_tqdm=True), plain.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5)  # the tokenizer puts the same BOS in front


def test_every_form_of_rows(lm_eval, checkpoint, tokenizer, tmp_path):
    """Questions end in an answer, contexts share their ending, and a last word must be the likeliest."""
    model = load_behind_prompt(checkpoint, [], torch.float32, CPU)
    questions = choice_rows(12, "Question: {}\n")
    contexts = [
        {"context_options": row["choices"], "continuation": ".", "gold": row["gold"]} for row in choice_rows(12)
    ]
    contexts[3]["continuation"] = "because winter"
    last = [{"context": text, "continuation": "stone"} for text in texts(12, 6, 4)]
    best = model(torch.tensor([tokenizer(last[5]["context"])["input_ids"]])).logits[0, -1].argmax()
    last[5]["continuation"] = tokenizer.decode(best)
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", rows)
        for name, rows in {"piqa": questions, "winogrande_val": contexts, "last": last}.items()
    ]
    scores = zero_shot(lambda device: model, tokenizer, paths, None, 4, [CPU])
    as_asked = [row | {"query": row["query"].rstrip() + "\nAnswer:"} for row in questions]
    assert scores["piqa"].value == pytest.approx(sum(solved_by_hand(model, tokenizer, as_asked, True)) / 12)
    solved = 0
    for row in contexts:
        tail = row["continuation"] if row["continuation"] == "." else " " + row["continuation"]
        found = [log_likelihood(model, tokenizer, context, tail)[0] for context in row["context_options"]]
        solved += found.index(max(found)) == row["gold"]
    assert (scores["winogrande_val"].metric, scores["winogrande_val"].value) == ("acc", pytest.approx(solved / 12))
    judged = [log_likelihood(model, tokenizer, row["context"], " " + row["continuation"])[1] for row in last]
    assert scores["last"].value == pytest.approx(sum(judged) / 12)


@pytest.mark.parametrize("limit", [None, 7])
def test_several_processes_find_what_one_finds(lm_eval, checkpoint, tokenizer, tmp_path, limit):
    """Of 24 and of 7 documents, which three processes can't share alike."""
    load = functools.partial(load_behind_prompt, checkpoint, (0,), torch.float32)
    paths = [write_rows(tmp_path / f"{name}.jsonl", choice_rows()) for name in ("piqa", "boolq")]
    one, three = (zero_shot(load, tokenizer, paths, limit, 4, [CPU] * count) for count in (1, 3))
    assert three == one
    assert three["piqa"].documents == (limit or 24)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for(2, torch.device("cuda")) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(UserError, match=r"evaluation\.devices: 3 are asked for, but this host has 2"):
        devices_for(3, torch.device("cuda"))


def test_a_limit_takes_the_first_documents(lm_eval, checkpoint, tokenizer, tmp_path):
    rows = choice_rows()
    model = load_behind_prompt(checkpoint, [], torch.float32, CPU)
    score = zero_shot(lambda device: model, tokenizer, [write_rows(tmp_path / "boolq.jsonl", rows)], 5, 4, [CPU])[
        "boolq"
    ]
    assert (score.metric, score.documents) == ("acc", 5)  # as the field reports BoolQ
    assert score.value == pytest.approx(sum(solved_by_hand(model, tokenizer, rows[:5], False)) / 5)


def test_a_run_is_scored_and_scored_again(lm_eval, checkpoint, tokenizer, fit, tmp_path, capsys):
    rows = choice_rows()
    tasks = f"--evaluation.zero_shot=[{write_rows(tmp_path / 'own.jsonl', rows)}]"
    run = fit(checkpoint, tmp_path / "run", RTN, tasks)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    scores = results["zero_shot"]["own"]
    assert (scores["metric"], scores["documents"]) == ("acc_norm", 24)
    for key, model in {
        "fp": AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(),
        "quantized": load_quantized(run / "model", CPU),
    }.items():
        assert scores[key]["value"] == pytest.approx(sum(solved_by_hand(model, tokenizer, rows, True)) / 24)
    output = tmp_path / "figures.json"
    assert cli.main(["test", f"--run_dir={run}", "--accelerator=cpu", f"--output={output}"]) == 0
    again = json.loads(output.read_text(encoding="utf-8"))
    assert again == {"perplexity": results["perplexity"], "zero_shot": results["zero_shot"]}
    assert capsys.readouterr().err == ""  # no progress bars of lm-eval's
    assert "own" in (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: `hub(rows)` makes every set hold these rows; `hub(None)` is a cut cable."""

    def install(rows):
        def load_dataset(path, name=None, **settings):
            if rows is None:
                raise ConnectionError(f"Couldn't reach '{path}' on the Hub\n(offline)")
            return datasets.DatasetDict(
                dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows))
            )

        monkeypatch.setattr("datasets.load_dataset", load_dataset)

    return install


def test_every_name_is_one_of_lm_evals_own(lm_eval):
    check_zero_shot(Evaluation(zero_shot=list(TASKS)), CPU)
    assert set(TASKS) <= set(known_to_lm_eval().all_tasks)


def test_a_task_of_the_hub_is_scored_by_its_own_template(lm_eval, hub, checkpoint, tokenizer):
    """PIQA asks `Question: … Answer:` and gives two solutions; a file beside it is a task like any other."""
    rows = [
        {"goal": row["query"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": n % 2}
        for n, row in enumerate(choice_rows(12))
    ]
    hub(rows)
    model = load_behind_prompt(checkpoint, [], torch.float32, CPU)
    as_asked = [
        {"query": f"Question: {row['goal']}\nAnswer:", "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}
        for row in rows
    ]
    score = zero_shot(lambda device: model, tokenizer, ["piqa"], None, 4, [CPU])["piqa"]
    assert (score.metric, score.documents) == ("acc_norm", 12)
    assert score.value == pytest.approx(sum(solved_by_hand(model, tokenizer, as_asked, True)) / 12)
    assert 0 < score.value < 1


def test_a_set_out_of_reach_is_one_line_before_the_work(lm_eval, hub, checkpoint, fit_arguments, tmp_path, capsys):
    hub(None)
    given = "--evaluation.zero_shot=[boolq]"
    for command in (
        fit_arguments(checkpoint, tmp_path / "run", RTN, given),
        ["test", f"--checkpoint={checkpoint}", given, "--accelerator=cpu"],
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        for word in ("evaluation.zero_shot", "boolq", "can't be fetched", "Couldn't reach", ".jsonl"):
            assert word in line
    assert not (tmp_path / "run" / "blocks").exists()


def test_files_need_no_hub(lm_eval, hub):
    hub(None)
    assert fetch_tasks(["rows.jsonl"]) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read"),
        ("not JSON\n", "line 1 is no JSON"),
        ('{"text": "x"}\n' * 2, "none of the forms: query, choices"),
        (ROW + "\n", "fewer than two rows"),
        (ROW + '{"query": "x", "choices": ["a", "b"]}\n', "line 2: has none of the forms"),
        (ROW + "\n[1]\n", "line 3: has none of the forms"),
        (ROW + '{"query": 1, "choices": ["a", "b"], "gold": 0}\n', "line 2: query must be a text, not 1"),
        (ROW + '{"query": "x", "choices": ["a"], "gold": 0}\n', "line 2: choices must be a list of two or more"),
        (ROW + '{"query": "x", "choices": "ab", "gold": 0}\n', "line 2: choices must be a list of two or more"),
        (ROW + '{"query": "x", "choices": ["a", 2], "gold": 0}\n', "line 2: choices must be a list of two or more"),
        (ROW + '{"query": "x", "choices": ["a", ""], "gold": 0}\n', "line 2: choices must be a list of two or more"),
        (ROW + '{"query": "x", "choices": ["a", "b"], "gold": 2}\n', "line 2: gold must be .* 0 to 1, not 2"),
        (ROW + '{"query": "x", "choices": ["a", "b"], "gold": -1}\n', "line 2: gold must be"),
        (ROW + '{"query": "x", "choices": ["a", "b"], "gold": "0"}\n', 'line 2: gold must be .* not "0"'),
        (ROW + '{"query": "x", "choices": ["a", "b"], "gold": true}\n', "line 2: gold must be"),
        (ROW + '{"context": "x", "continuation": "y"}\n', "line 2 has not the keys of the first: query, choices"),
        ('{"context": "x", "continuation": ""}\n' * 2, "line 1: continuation must be a text"),
        ('{"context_options": ["a"], "continuation": "y", "gold": 0}\n' * 2, "line 1: context_options must be"),
    ],
)
def test_files_of_no_use_are_refused(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        check_zero_shot(Evaluation(zero_shot=[str(path)]), CPU)


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [write_rows(folder / "rows.jsonl", choice_rows(2)) for folder in (tmp_path, tmp_path / "a")]
    with pytest.raises(UserError, match="share a name"):
        check_zero_shot(Evaluation(zero_shot=paths), CPU)


def test_an_unknown_task_is_answered_with_the_known(checkpoint, fit_arguments, tmp_path, capsys):
    assert main(fit_arguments(checkpoint, tmp_path / "never", RTN, "--evaluation.zero_shot=[mmlu]")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in ("evaluation.zero_shot", "mmlu", "arc_challenge", "winogrande", ".jsonl"):
        assert word in line
    assert not (tmp_path / "never").exists()


def test_without_lm_eval_one_line_names_the_package(monkeypatch, checkpoint, fit_arguments, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(fit_arguments(checkpoint, tmp_path / "never", RTN, "--evaluation.zero_shot=[piqa]")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lm-eval" in line
    assert "requirements-zero-shot.txt" in line
