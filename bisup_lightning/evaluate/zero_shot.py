"""Accuracy on zero-shot tasks through lm-eval, from the hub or from local rows (paper, Tables 2, A2–A5, A8–A10)."""

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bisup_lightning.errors import UserError
from bisup_lightning.evaluate.settings import Evaluation

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
OPTIONS = ("choices", "context_options")  # their keys that hold what is chosen from, before `gold`
RESULTS = "results.json"
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


def check_zero_shot(evaluation: Evaluation, device: torch.device) -> None:
    """Refuse tasks that can't be run, or not on so many devices, before any work.

    Raises:
        UserError: Naming the key, and the known tasks or the fault of a file.
    """
    tasks = evaluation.zero_shot
    for task in tasks:
        if task not in TASKS and not task.endswith(".jsonl"):
            raise UserError(f"evaluation.zero_shot: {task} is none of {', '.join(TASKS)} and no .jsonl file")
        if task not in TASKS:
            _kind(Path(task))
    if len({_name(task) for task in tasks}) < len(tasks):
        raise UserError(f"evaluation.zero_shot: two of {', '.join(tasks)} share a name")
    if tasks:
        _lm_eval()
    devices_for(evaluation.devices, device)


def devices_for(count: int, device: torch.device) -> list[torch.device]:
    """The device of each of `count` processes that score: as many GPUs of this host, or the CPU for all.

    Raises:
        UserError: If this host has fewer GPUs.
    """
    if count == 1 or device.type == "cpu":
        return [device] * count
    if count > torch.cuda.device_count():
        raise UserError(f"evaluation.devices: {count} are asked for, but this host has {torch.cuda.device_count()}")
    return [torch.device("cuda", index) for index in range(count)]


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
    load: Callable[[torch.device], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    devices: Sequence[torch.device],
) -> dict[str, Score]:
    """Scores by task; a file's name is that of the task, without its suffix.

    Args:
        load: Gives the whole model on a device. For several devices it is pickled.
        tokenizer: Its tokenizer.
        tasks: Names of `TASKS`, or .jsonl files with rows of query, choices and gold (an index); of context_options,
            continuation and gold; or of context and continuation.
        limit: Most documents of each task; None for all.
        batch_size: Texts in a forward pass.
        devices: Each holds the model, in a process of its own if there are several, and scores its part of the
            documents.
    """
    work = _Work(load, tokenizer, tuple(tasks), limit, batch_size, tuple(devices))
    if len(devices) == 1:
        results = work.score()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_score_part, (work, Path(folder)), nprocs=len(devices))
            results = json.loads(Path(folder, RESULTS).read_text(encoding="utf-8"))
    return {_name(task): _score(results, task) for task in tasks}


@dataclass(frozen=True)
class _Work:
    load: Callable[[torch.device], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int
    devices: tuple[torch.device, ...]

    def score(self, rank: int = 0) -> Any:
        """lm-eval's results over all documents; None in all processes but the first."""
        lm_eval = _lm_eval()
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=self.load(self.devices[rank]), tokenizer=self.tokenizer, batch_size=self.batch_size)
        if len(self.devices) > 1:  # lm-eval's own way to speak with the others comes with its own way to load models
            model._rank, model._world_size = rank, len(self.devices)
            model.all_gather, model.barrier = _all_gather, dist.barrier
        return _evaluate(lm_eval, model, self.tasks, self.limit)


def _all_gather(x: torch.Tensor) -> torch.Tensor:
    """The numbers that all processes pass in, by rank."""
    numbers = [torch.zeros(1, dtype=x.dtype) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, x.cpu().reshape(1))
    return torch.cat(numbers)


def _score_part(rank: int, work: _Work, folder: Path) -> None:
    """Score one process's part of the documents; the first process writes the results of all into `folder`."""
    device = work.devices[rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), len(work.devices))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(work.devices))
    results = work.score(rank)
    if rank == 0:
        found = {key: results[key] for key in ("results", "n-samples")}
        (folder / RESULTS).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _evaluate(lm_eval: Any, model: Any, tasks: Sequence[str], limit: int | None) -> Any:
    from lm_eval.tasks import TaskManager

    files = {f"file_{_name(task)}": Path(task) for task in tasks if task not in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():  # lm-eval reads YAML, of which JSON is a part
            Path(folder, f"{name}.yaml").write_text(json.dumps(_task(name, path)), encoding="utf-8")
        with redirect_stderr(io.StringIO()):  # its progress bars can't be turned off
            return lm_eval.simple_evaluate(
                model=model,
                tasks=[*fetch_tasks(tasks), *files],
                limit=limit,
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                log_samples=False,
                bootstrap_iters=100,  # for a perplexity alone: the error of an accuracy has a formula
            )


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
    """The kind of a file's rows, each of which is looked at.

    Raises:
        UserError: Naming the first line that is no row, or none of the first one's kind.
    """
    where = f"evaluation.zero_shot: {path}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} can't be read ({error})") from error
    kinds = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                kinds.append(_kind_of_row(json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: line {number} is no JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: line {number}: {error}") from error
            if kinds[-1] != kinds[0]:
                raise UserError(f"{where}: line {number} has not the keys of the first: {', '.join(ROWS[kinds[0]])}")
    if len(kinds) < 2:
        raise UserError(f"{where} has fewer than two rows, which tell nothing of an error; give more")
    return kinds[0]


def _kind_of_row(row: Any) -> str:
    """The first kind whose keys a row has.

    Raises:
        ValueError: If there is none, or a value is not what its key asks for.
    """
    keys = set(row) if isinstance(row, dict) else set()
    kind = next((kind for kind, needed in ROWS.items() if keys.issuperset(needed)), None)
    if kind is None:
        raise ValueError(f"has none of the forms: {'; '.join(', '.join(needed) for needed in ROWS.values())}")
    options: Any = ()
    for key in ROWS[kind]:
        value = row[key]
        if key in OPTIONS:
            options, wanted = value, "a list of two or more texts"
            right = isinstance(value, list) and len(value) > 1 and all(one and isinstance(one, str) for one in value)
        elif key == "gold":
            wanted = f"the place of the right one in that list, 0 to {len(options) - 1}"
            right = type(value) is int and 0 <= value < len(options)
        else:
            wanted = "a text"
            right = isinstance(value, str) and (value != "" or key != "continuation")
        if not right:
            raise ValueError(f"{key} must be {wanted}, not {json.dumps(value)[:60]}")
    return kind


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
