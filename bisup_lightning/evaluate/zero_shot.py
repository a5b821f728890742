"""Accuracy on zero-shot tasks through lm-eval, from the hub or from local rows (paper, Tables 2, A2–A5, A8–A10)."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bisup_lightning.errors import UserError

TASKS = {  # with the metric that the field reports
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "winogrande": "acc",
    "lambada_openai": "acc",
}
ROWS = {  # kinds of local rows, told apart by their keys
    "choices": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "continuation": ("context", "continuation"),
}
PUNCTUATION = ".,;:!?'"  # what follows a word without a space


@dataclass(frozen=True)
class Score:
    """A model's accuracy on one task.

    Args:
        metric: `acc`, or `acc_norm`, where choices are compared by their likelihood for each byte.
        value: Share of documents that are solved.
        stderr: Standard error of that mean.
        documents: Their number.
    """

    metric: str
    value: float
    stderr: float
    documents: int


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that can't be run, before any work.

    Raises:
        UserError: Naming the key, and the known tasks or the fault of a file.
    """
    for task in tasks:
        if task not in TASKS and not task.endswith(".jsonl"):
            raise UserError(f"evaluation.zero_shot: {task} is none of {', '.join(TASKS)} and no .jsonl file")
        if task not in TASKS:
            _kind(Path(task))
    if len({_name(task) for task in tasks}) < len(tasks):
        raise UserError(f"evaluation.zero_shot: two of {', '.join(tasks)} share a name")
    if tasks:
        _lm_eval()


def fetch_tasks(tasks: Sequence[str]) -> list[Any]:
    """Load the documents of the named tasks, from the hub or its cache; files are passed over.

    Returns:
        lm-eval's tasks, new ones at each call.

    Raises:
        UserError: Naming the task whose documents are out of reach.
    """
    found = []
    for task in tasks:
        if task in TASKS:
            known = known_to_lm_eval()
            try:
                found += known.load([task])["tasks"].values()
            except Exception as error:  # a library's own for each way in which a network can be missing
                raise UserError(
                    f"evaluation.zero_shot: the set of {task} can't be fetched ({error}); "
                    "give it a network, or name a .jsonl file of such rows"
                ) from error
    return found


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
) -> dict[str, Score]:
    """Scores by task; a file's name is that of the task, without its suffix.

    Args:
        model: A whole model in memory.
        tokenizer: Its tokenizer.
        tasks: Names of `TASKS`, or .jsonl files with rows of query, choices and gold (an index); of context_options,
            continuation and gold; or of context and continuation.
        limit: Most documents of each task; None for all.
        batch_size: Texts in a forward pass.
    """
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {f"file_{_name(task)}": Path(task) for task in tasks if task not in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():  # lm-eval reads YAML, of which JSON is a part
            Path(folder, f"{name}.yaml").write_text(json.dumps(_task(name, path)), encoding="utf-8")
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[*fetch_tasks(tasks), *files],
            limit=limit,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            log_samples=False,
            bootstrap_iters=100,  # for a perplexity alone: the error of an accuracy has a formula
        )
    return {_name(task): _score(results, task) for task in tasks}


def _score(results: Mapping[str, Any], task: str) -> Score:
    name = task if task in TASKS else f"file_{_name(task)}"
    figures = results["results"][name]
    known = next((metric for known, metric in TASKS.items() if _name(task).startswith(known)), "acc_norm")
    metric = known if f"{known},none" in figures else "acc"
    documents = results["n-samples"][name]["effective"]
    return Score(metric, float(figures[f"{metric},none"]), float(figures[f"{metric}_stderr,none"]), int(documents))


def _task(name: str, path: Path) -> dict[str, Any]:
    """A local file as the configuration of an lm-eval task."""
    kind = _kind(path)
    tail = f"{{{{ ('' if continuation[0] in {json.dumps(PUNCTUATION)} else ' ') + continuation }}}}"
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
    }
    if kind == "choices":
        # A question is followed by its answer, a beginning by its continuation.
        question = "{{ query.rstrip() + '\nAnswer:' if 'Question:' in query else query.rstrip() }}"
        task |= {"doc_to_text": question, "doc_to_choice": "choices", "doc_to_target": "gold"}
    elif kind == "contexts":  # the same words behind each context
        task |= {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": tail}
    else:
        task |= {"doc_to_text": "{{ context.rstrip() }}", "doc_to_target": tail}
    if kind != "choices":
        task |= {"target_delimiter": ""}
    metrics = ("acc", "acc_norm") if kind == "choices" else ("acc",)
    return task | {
        "output_type": "loglikelihood" if kind == "continuation" else "multiple_choice",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }


def _kind(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            keys = set(json.loads(file.readline()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"evaluation.zero_shot: {path} can't be read as rows of JSON ({error})") from error
    for kind, needed in ROWS.items():
        if keys.issuperset(needed):
            return kind
    forms = "; ".join(", ".join(needed) for needed in ROWS.values())
    raise UserError(f"evaluation.zero_shot: the rows of {path} have none of the forms: {forms}")


def _name(task: str) -> str:
    return task if task in TASKS else Path(task).stem


@cache
def known_to_lm_eval() -> Any:
    """lm-eval's list of its own tasks: read once, as it is made of thousands of files."""
    _lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface  # needs more than lm_eval itself
    except ImportError as error:
        raise UserError(
            f"evaluation.zero_shot needs the package lm-eval ({error}): pip install -r requirements-zero-shot.txt"
        ) from error
    return lm_eval
