"""Text for calibration and evaluation: named sets, local files, or samples of the model itself.

Shape suffixes: N sequences, T tokens.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from bisup_lightning.errors import UserError, first_line
from bisup_lightning.model.whole import load_whole_model

NAMED = ("wikitext2", "c4", "c4_new", "self")
SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")
HELD_OUT = 1_000_003  # added to the seed of text that must not be calibration text
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


@dataclass(frozen=True)
class CalibrationData:
    """What the blocks are calibrated on (paper §5.1: 128 samples of 2048 tokens, batch 8).

    Args:
        calibration: wikitext2, c4, self (text sampled from the model itself), or a .txt, .jsonl or .parquet file.
        num_samples: Number of sequences N.
        seq_len: Tokens in each, T.
        batch_size: Sequences in a training batch.
    """

    calibration: str = "wikitext2"
    num_samples: int = 128
    seq_len: int = 2048
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_source("data.calibration", self.calibration)
        for name, least in {"num_samples": 1, "seq_len": 2, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, not {getattr(self, name)}")


def check_source(key: str, source: str) -> None:
    """Refuse a source of text that is neither a known name nor a readable file.

    Raises:
        UserError: Naming the configuration key.
    """
    path = Path(source)
    if source in NAMED:
        return
    if path.suffix not in SUFFIXES:
        raise UserError(f"{key}: {source} is none of {', '.join(NAMED)} and no {', '.join(SUFFIXES)} file")
    if not path.is_file():
        raise UserError(f"{key}: there is no file {source}")


def documents(key: str, source: str, split: str) -> list[str]:
    """The texts of a named set's split (`train`, `validation` or `test`) or of a local file (whatever the split).

    Raises:
        UserError: If the set can't be fetched or the file holds no text; names the configuration key.
    """
    path = Path(source)
    try:
        if path.suffix in (".txt", ".raw"):
            texts = [_read(path)]
        elif path.suffix == ".jsonl":
            texts = _json_lines(path)
        else:
            texts = _dataset(source, split)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if not any(texts):
        raise UserError(f"{key}: {source} holds no text")
    return texts


def _json_lines(path: Path) -> list[str]:
    texts = []
    lines = _read(path).removesuffix("\n").split("\n")  # words may hold other characters that end lines
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"{path}: line {number} is no JSON object with a 'text' of words")
        texts.append(text)
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _dataset(source: str, split: str) -> list[str]:
    import datasets  # slow to import, and needed for few sources

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, it raises, too
    try:
        if source == "wikitext2":
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        elif source in ("c4", "c4_new"):
            file = C4_FILES["train" if split == "train" else "validation"]
            rows = datasets.load_dataset("allenai/c4", data_files={"rows": file}, split="rows")
        else:
            rows = datasets.load_dataset("parquet", data_files=source, split="train")
        texts = list(rows["text"])
    except KeyError as error:
        raise UserError(f"{source} has no column 'text'") from error
    except Exception as error:  # the library raises many kinds for an unreachable network
        raise UserError(f"{source} can't be loaded ({first_line(error)}); give a local file instead") from error
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{source}: row {number} has no words in its column 'text'")
    return texts


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of a text in one tokenizer call, with its special tokens."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def calibration_tokens(data: CalibrationData, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
    """Random slices [N, T] of the joined training split, seeded.

    Raises:
        UserError: If the text is shorter than two sequences.
    """
    source, length = data.calibration, data.seq_len
    generator = torch.Generator().manual_seed(seed)
    texts = documents("data.calibration", source, "train")
    if source in ("c4", "c4_new"):  # far more text than is needed: join a random part of it
        texts = [texts[i] for i in torch.randperm(len(texts), generator=generator)[: 8 * data.num_samples].tolist()]
    ids = tokenize("\n\n".join(texts), tokenizer)
    if len(ids) < 2 * length:
        raise UserError(
            f"data.calibration: {source} has {len(ids)} tokens, fewer than 2 × data.seq_len = {2 * length}; "
            "give more text or a smaller data.seq_len"
        )
    starts = torch.randint(0, len(ids) - length + 1, (data.num_samples,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, max_chunks: int | None) -> Tensor:
    """Chunks [N, T] of a set by the field's protocol for it; the tail is dropped.

    WikiText-2: test rows joined by a blank line. `c4`: 256 random slices of validation documents of at least T tokens,
    seed 0. `c4_new`: the first 1100 validation documents joined by a space, 256 chunks. Files: documents joined by a
    blank line.

    Raises:
        UserError: If the text is shorter than one chunk.
    """
    texts = documents("evaluation.perplexity", source, "validation" if source.startswith("c4") else "test")
    if source == "c4":
        return _random_slices(texts, tokenizer, seq_len)[:max_chunks]
    joined = " ".join(texts[:1100]) if source == "c4_new" else "\n\n".join(texts)
    ids = tokenize(joined, tokenizer)
    if len(ids) < seq_len:
        raise UserError(
            f"evaluation.perplexity: {source} has {len(ids)} tokens, fewer than evaluation.seq_len = {seq_len}"
        )
    chunks_NT = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return chunks_NT[:256][:max_chunks] if source == "c4_new" else chunks_NT[:max_chunks]


def _random_slices(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    slices: list[Tensor] = []
    for index in torch.randperm(len(texts), generator=generator).tolist():
        ids = tokenize(texts[index], tokenizer)
        if len(ids) >= seq_len:
            start = int(torch.randint(0, len(ids) - seq_len + 1, (1,), generator=generator))
            slices.append(ids[start : start + seq_len])
        if len(slices) == 256:
            break
    if not slices:
        raise UserError(f"evaluation.perplexity: no document of c4 has evaluation.seq_len = {seq_len} tokens")
    return torch.stack(slices)


@torch.no_grad()
def self_generated(
    folder: Path, num_samples: int, seq_len: int, seed: int, device: torch.device, batch_size: int = 64
) -> Tensor:
    """Sequences [N, T] sampled from the full-precision model itself at temperature 1, from its first token on.

    Needs the whole model in memory, unlike all else here.

    Raises:
        UserError: If the model has no token to begin a text with.
    """
    model: Any = load_whole_model(folder, device)
    bos, known = model.config.bos_token_id, model.config.vocab_size
    if bos is None or not 0 <= bos < known:
        raise UserError(
            "data.calibration, evaluation.perplexity: self needs a model whose config.json has a bos_token_id "
            f"from 0 to {known - 1}, not {bos}; give a text file"
        )
    # A checkpoint's own habits (penalties, top-k, …) would bend the text.
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        min_new_tokens=seq_len,
        max_new_tokens=seq_len,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=bos,
    )
    samples = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, num_samples, batch_size):
            first = torch.full((min(batch_size, num_samples - start), 1), bos, device=device)
            samples.append(model.generate(first, attention_mask=torch.ones_like(first))[:, 1:].cpu())
    return torch.cat(samples)
