"""The card of a quantized model: what it is and how to load it, as the hub shows it."""

import re
from pathlib import Path
from textwrap import indent

from huggingface_hub import ModelCardData

from bisup_lightning.quant.spec import Scheme

CARD = "README.md"
LICENSE = re.compile(r"^(license|license_name): *([\w.-]+) *$", re.MULTILINE)

TEXT = """\
---
{data}
---

# {precision} of {checkpoint}

Made by bisup_lightning, an implementation of [BiSup](https://arxiv.org/abs/2405.15346).

- checkpoint: {checkpoint}
- precision: {precision} (bits of weights, activations, keys and values; group size of the weights, if any)
- transform: {transform}
- solver: {solver}

Quantization is simulated: weights are stored packed and dequantized on the fly.

## Load it

It needs the package bisup_lightning, which `pip install .` in its repository installs.

```python
import bisup_lightning  # without it, transformers only warns, and loads random weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{prompt}

## Figures

What it loses is in the report of the run that made it: `report.html` and `results.json`, beside this folder.
"""
PROMPT = """\
The exact keys and values of this prompt stand in front of every input by themselves; an input that already begins with
it is recognized:

"""


def model_card(checkpoint: str, folder: Path, scheme: Scheme, transform: str, solver: str, prompt: str) -> str:
    """The card's text, of what is known before anything is measured: the same whenever the same run is assembled.

    Args:
        checkpoint: What was quantized: a folder or a hub id.
        folder: The checkpoint's files.
        scheme: The quantizers.
        transform: Name of the transform.
        solver: Name of the solver.
        prompt: The high-precision prompt; may be empty.
    """
    on_hub, terms = not Path(checkpoint).is_dir(), _license(folder)
    data = ModelCardData(
        base_model=checkpoint if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        tags=["bisup", "quantized"],
        license=terms.get("license"),
        license_name=terms.get("license_name"),
    )
    return TEXT.format(
        data=data.to_yaml(),
        checkpoint=checkpoint if on_hub else "a local checkpoint",  # the same wherever it lies
        precision=scheme.name,
        transform=transform,
        solver=solver,
        prompt=PROMPT + indent(prompt, "    ") if prompt else "No prompt stands in front of its inputs.",
    )


def _license(folder: Path) -> dict[str, str]:
    """What a checkpoint's own card says of its license; read without a YAML parser, as a stranger wrote it."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    front_matter = text.partition("\n---")[0] if text.startswith("---\n") else ""
    return dict(LICENSE.findall(front_matter))
