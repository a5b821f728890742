"""Perplexity by the field's protocols, block by block, so that the model need not fit into memory.

Shape suffixes: N sequences, T tokens, D hidden size, P prompt tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bisup_lightning.evaluate.metrics import LanguageModelMetrics
from bisup_lightning.model.blockwise import BlockwiseModel, ExactPrompt, run_layer


@torch.no_grad()
def final_hidden(
    model: BlockwiseModel, sets: Mapping[str, Tensor], prompts_ids: Sequence[Sequence[int]], batch_size: int
) -> list[dict[str, Tensor]]:
    """Hidden states [N, T, D] behind the last block, of every set behind every prompt, reading each block once.

    Args:
        model: Full-precision, or quantized (then its stored prompt replaces the one that is named).
        sets: Token ids [N, T] by name.
        prompts_ids: Token ids of each prompt; an empty one for none.
        batch_size: Sequences in a forward pass.
    """
    hidden = [{name: model.embed(ids_NT) for name, ids_NT in sets.items()} for _ in prompts_ids]
    prompts = [ExactPrompt(model, prompt_ids) for prompt_ids in prompts_ids]
    for index, layer in model.layers():
        for prompt, states in zip(prompts, hidden, strict=True):
            kv = prompt.block_kv(index, layer)
            for states_NTD in states.values():
                positions = model.positions(index, states_NTD.shape[1], prompt.length)
                for start in range(0, len(states_NTD), batch_size):
                    batch = states_NTD[start : start + batch_size]
                    batch.copy_(run_layer(layer, batch.to(model.device), positions, kv))
    return hidden


@torch.no_grad()
def score(
    model: BlockwiseModel,
    hidden_NTD: Tensor,
    ids_NT: Tensor,
    reference: tuple[BlockwiseModel, Tensor] | None = None,
) -> dict[str, float]:
    """Figures of `LanguageModelMetrics` from final hidden states, compared with a reference model's if given."""
    metrics = LanguageModelMetrics().to(model.device)
    head = model.head()
    reference_head = reference[0].head() if reference else None
    for index in range(len(ids_NT)):  # one chunk at a time: logits are large
        logits_1TV = head(hidden_NTD[index : index + 1].to(model.device))
        reference_1TV = None
        if reference and reference_head:
            reference_1TV = reference_head(reference[1][index : index + 1].to(model.device))
        metrics.update(logits_1TV, ids_NT[index : index + 1].to(model.device), reference_1TV)
    return metrics.compute()


def evaluate(
    fp: BlockwiseModel,
    quantized: BlockwiseModel | None,
    sets: Mapping[str, Tensor],
    prompt_ids: Sequence[int],
    batch_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, dict[str, Any]]:
    """Perplexity of the full-precision model, the same behind the prompt, and the quantized model, by set.

    Returns:
        For each set `fp`, `fp_prompt`, and with a quantized model `quantized`, `kl` (mean divergence in nats from the
        full-precision model behind the same prompt) and `top1` (share of tokens with the same likeliest successor).
        With a tokenizer also `word` and `byte`: the perplexities by whitespace-separated word and by UTF-8 byte of the
        text, which models of different vocabularies share.
    """
    hidden = final_hidden(fp, sets, [(), prompt_ids] if prompt_ids else [()], batch_size)
    plain, prompted = hidden[0], hidden[-1]
    ours = None if quantized is None else final_hidden(quantized, sets, [prompt_ids], batch_size)[0]
    results: dict[str, dict[str, Any]] = {}
    for name, ids_NT in sets.items():
        results[name] = {
            "fp": score(fp, plain[name], ids_NT)["perplexity"],
            "fp_prompt": score(fp, prompted[name], ids_NT)["perplexity"],
        }
        if quantized is not None and ours is not None:
            figures = score(quantized, ours[name], ids_NT, reference=(fp, prompted[name]))
            results[name] |= {"quantized": figures.pop("perplexity"), **figures}
        if tokenizer is not None:
            results[name] |= by_text_unit(results[name], ids_NT, tokenizer)
    return results


def by_text_unit(
    figures: Mapping[str, float], ids_NT: Tensor, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """Perplexities by token turned into those by `word` and by `byte`: the same likelihood, shared among other units.

    Args:
        figures: Perplexities by token under `fp`, `fp_prompt` and `quantized`.
        ids_NT: The text; all but the first token of a sequence are predicted.
        tokenizer: Gives the words back.
    """
    texts = [str(tokenizer.decode(ids_T, skip_special_tokens=True)) for ids_T in ids_NT[:, 1:].tolist()]
    counts = {"word": sum(len(text.split()) for text in texts), "byte": sum(len(text.encode()) for text in texts)}
    tokens = ids_NT[:, 1:].numel()
    return {
        unit: {key: figures[key] ** (tokens / count) for key in ("fp", "fp_prompt", "quantized") if key in figures}
        for unit, count in counts.items()
    }
