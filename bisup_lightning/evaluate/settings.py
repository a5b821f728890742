"""What a finished model is measured on: the settings of perplexity and of zero-shot tasks."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """What is measured when the walk is done.

    Args:
        perplexity: Sets of text: wikitext2, c4, c4_new, self (held-out samples of the model itself), or files.
        seq_len: Tokens in a chunk; null for the calibration's.
        max_chunks: Most chunks of each set; null for all.
        batch_size: Chunks in a batch.
        zero_shot: Tasks for lm-eval: arc_challenge, arc_easy, boolq, hellaswag, piqa, winogrande, lambada_openai, or
            .jsonl files of rows such as {"query": …, "choices": […], "gold": 0}. The whole model must fit into memory.
        zero_shot_limit: Most documents of each task; null for all.
        devices: That share the documents of zero-shot tasks; each holds the whole model.
    """

    perplexity: Sequence[str] = ()
    seq_len: int | None = None
    max_chunks: int | None = None
    batch_size: int = 8
    zero_shot: Sequence[str] = ()
    zero_shot_limit: int | None = None
    devices: int = 1

    def __post_init__(self) -> None:
        for name, least in {"seq_len": 2, "max_chunks": 1, "batch_size": 1, "zero_shot_limit": 2, "devices": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"evaluation.{name} must be at least {least}, not {value}")
