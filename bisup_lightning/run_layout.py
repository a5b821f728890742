"""What the files of a run directory are called; all names are relative to it.

config.yaml                        the resolved configuration
tokens.safetensors                 the calibration text and the prompt, token ids
blocks/00007/block.safetensors     of finished block 7: the tensors that the model holds of it,
blocks/00007/metrics.json          its figures,
blocks/00007/theta.safetensors     what was learned in it, where that is kept
streams/00008.safetensors          the hidden states behind the first 8 blocks
partial/00008-0-000120.ckpt        block 8 in training: attempt 0, saved behind step 120
model/…                            the published model
results.json                       the figures of the finished run
manifest.json                      which of all these count, with the SHA-256 of each
manifest-00001.json                those that process 1 of several has written, until the first one takes them over

No manifest names owner.json (who works there), logs/00007/….csv (the epochs of block 7) and analysis.json (`analyze`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MANIFEST, CONFIG, TOKENS, RESULTS = "manifest.json", "config.yaml", "tokens.safetensors", "results.json"
BLOCKS, STREAMS, PARTIAL, MODEL = FOLDERS = ("blocks", "streams", "partial", "model")
BLOCK, METRICS, THETA = "block.safetensors", "metrics.json", "theta.safetensors"  # in the folder of a finished block
OWNER, ANALYSIS = "owner.json", "analysis.json"
RANK_MANIFESTS, EPOCH_LOGS = "manifest-*.json", "logs/[0-9]*/*.csv"  # patterns

Kind = Literal["config", "tokens", "block", "metrics", "theta", "streams", "partial", "model", "results"]
_PATTERNS: dict[Kind, re.Pattern[str]] = {  # all that a manifest may speak of
    "config": re.compile(r"config\.yaml"),
    "tokens": re.compile(r"tokens\.safetensors"),
    "block": re.compile(r"blocks/(?P<index>\d{5})/block\.safetensors"),
    "metrics": re.compile(r"blocks/(?P<index>\d{5})/metrics\.json"),
    "theta": re.compile(r"blocks/(?P<index>\d{5})/theta\.safetensors"),
    "streams": re.compile(r"streams/(?P<index>\d{5})\.safetensors"),
    "partial": re.compile(r"partial/(?P<index>\d{5})-(?P<attempt>\d+)-\d+\.ckpt"),
    "model": re.compile(r"model/(?!\.\.?$)[^/]+"),
    "results": re.compile(r"results\.json"),
}


@dataclass(frozen=True)
class RunFile:
    """What a file is, as its name says.

    Args:
        kind: What it holds.
        index: The block that it belongs to; of streams, how many blocks they lie behind; −1 for none.
        attempt: Of a partial checkpoint, which try at training the block it belongs to, from 0.
    """

    kind: Kind
    index: int = -1
    attempt: int = 0


def parse(name: str) -> RunFile | None:
    """What the file of that name is; None if no manifest may name it."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(name):
            return RunFile(kind, **{key: int(digits) for key, digits in found.groupdict().items()})
    return None


def of_kind(kind: Kind, names: Iterable[str]) -> dict[str, RunFile]:
    """Those of the files that are of that kind, by name."""
    return {name: file for name in names if (file := parse(name)) is not None and file.kind == kind}


def manifest_file(rank: int) -> str:
    """Where one of several processes records what it has written."""
    return f"manifest-{rank:05d}.json" if rank else MANIFEST


def block_folder(index: int) -> str:
    """Where finished block `index` lies."""
    return f"{BLOCKS}/{index:05d}"


def block_file(index: int, part: str) -> str:
    """A file of it: BLOCK, METRICS or THETA."""
    return f"{block_folder(index)}/{part}"


def streams_file(blocks: int) -> str:
    """The streams behind the first `blocks` blocks."""
    return f"{STREAMS}/{blocks:05d}.safetensors"


def partial_prefix(index: int) -> str:
    """What the names of a block's partial checkpoints begin with."""
    return f"{PARTIAL}/{index:05d}-"


def partial_file(index: int, attempt: int, step: int) -> str:
    """The partial checkpoint of a block that a try at training it saved behind an optimizer step."""
    return f"{partial_prefix(index)}{attempt}-{step:06d}.ckpt"
