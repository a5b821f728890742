"""Completes a text with a quantized model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bisup_lightning.model.whole import load_whole_model


@torch.no_grad()
def complete(folder: Path, text: str, max_new_tokens: int, temperature: float, device: torch.device) -> str:
    """The text and what the model makes of it, behind the exact prompt.

    Args:
        folder: A run's `model/`.
        text: What to complete.
        max_new_tokens: Most tokens to add.
        temperature: 0 takes the likeliest token each time.
        device: Where to compute.
    """
    model: Any = load_whole_model(folder, device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer(text, return_tensors="pt").to(device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids_BT = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(ids_BT[0], skip_special_tokens=True))
