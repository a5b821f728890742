"""A checkpoint on disk or on the hub, read block by block from its safetensors shards; never whole."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bisup_lightning.errors import UserError
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, HEAD, STORED_ROTARY, layer_index, layer_prefix

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F16", "BF16", "F32", "F64")  # what safetensors calls the dtypes of weights that are not quantized
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


def resolve(checkpoint: str) -> Path:
    """The folder of a checkpoint: a local one, or a hub id fetched into the cache.

    Raises:
        UserError: If there is none, access is denied, or it holds no safetensors.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        if folder.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1:
            raise UserError(f"checkpoint: no folder {checkpoint}; give a folder or a hub id such as Qwen/Qwen2.5-0.5B")
        try:
            folder = Path(snapshot_download(checkpoint, allow_patterns=WANTED))
        except GatedRepoError as error:
            raise UserError(
                f"checkpoint: {checkpoint} is gated; ask for access on its page, then run 'hf auth login'"
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise UserError(f"checkpoint: no folder and no model on the hub is named {checkpoint}") from error
        except (LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"checkpoint: {checkpoint} is no folder, and the hub can't be reached; check the path or the network"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint: {folder} has no config.json")
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"only {pickles[0]}, which can run code when read; convert it to safetensors" if pickles else "no weights"
        raise UserError(f"checkpoint: {folder} has {why} ({SINGLE} or {INDEX} is needed)")
    return folder


class Checkpoint:
    """The tensors of a checkpoint's folder, by name, read when asked for.

    Args:
        folder: A folder from `resolve`.

    Raises:
        UserError: If a shard or the index is damaged, missing, or lies outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if (folder / SINGLE).is_file():
            with self._open(SINGLE) as shard:
                self.shard_of = dict.fromkeys(shard.keys(), SINGLE)
            return
        try:
            self.shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for name in set(self.shard_of.values()):
                if Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"it names the shard {name}, which is not in its folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"checkpoint: {index} is not a weight index: {str(error)[:200]}") from error

    def _open(self, shard: str):
        try:
            return safe_open(self.folder / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint: {self.folder / shard} can't be read: {error}") from error

    @property
    def shards(self) -> list[Path]:
        """The files that hold tensors, sorted."""
        return [self.folder / name for name in sorted(set(self.shard_of.values()))]

    @property
    def num_layers(self) -> int:
        """How many blocks it holds tensors of."""
        return len({layer_index(name) for name in self.shard_of} - {None})

    def __contains__(self, name: str) -> bool:
        return name in self.shard_of

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, in their stored dtype.

        Raises:
            UserError: If one is missing or damaged.
        """
        return dict(self._each(names, lambda file, name: file.get_tensor(name)))

    def _each(self, names: Iterable[str], get: Callable[[Any, str], Any]) -> Iterator[tuple[str, Any]]:
        """What `get` takes from the open shard of each named tensor, opening every shard once."""
        by_shard = defaultdict(list)
        for name in names:
            if name not in self.shard_of:
                raise UserError(f"checkpoint: {self.folder} has no tensor {name}; is it quantized already, or damaged?")
            by_shard[self.shard_of[name]].append(name)
        for shard, members in by_shard.items():
            with self._open(shard) as file:
                for name in members:
                    try:
                        yield name, get(file, name)
                    except SafetensorError as error:
                        raise UserError(f"checkpoint: {self.folder / shard}: {name}: {error}") from error

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """See that it holds the tensors that its architecture wants, and no others in a block, from the headers alone.

        Raises:
            UserError: Naming the first that is missing, superfluous, of another shape, or quantized.
        """
        wanted = dict(shapes) | ({HEAD: shapes[EMBEDDING]} if HEAD in self else {})
        for name, (shape, dtype) in self._each(wanted, header):
            where = f"checkpoint: {self.folder / self.shard_of[name]}: {name}"
            if shape != wanted[name]:
                raise UserError(f"{where} has shape {list(shape)}, but config.json asks for {list(wanted[name])}")
            if dtype not in FLOATS:
                raise UserError(f"{where} is {dtype}, not one of {', '.join(FLOATS)}; is it quantized already?")
        for name, shard in self.shard_of.items():
            if layer_index(name) is not None and name not in wanted and STORED_ROTARY not in name:
                raise UserError(f"checkpoint: {self.folder / shard}: {name} does not belong in such a block")

    def head_name(self, tied: bool) -> str:
        """The name of the output projection's tensor; `tied`: whether the configuration ties it to the embedding."""
        return EMBEDDING if tied or HEAD not in self.shard_of else HEAD

    def read_shared(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """A tensor outside the blocks: embedding, final norm, or head.

        Raises:
            UserError: If it is missing, damaged, or not finite.
        """
        tensor = self.read([name])[name].to(device)
        self._check_finite({name: tensor})
        return tensor.to(dtype)

    def read_layer(self, index: int, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors of block `index`, named as inside the block; floats in `dtype`, or as they are stored.

        Raises:
            UserError: If one is missing, damaged, or not finite.
        """
        prefix = layer_prefix(index)
        names = [name for name in self.shard_of if name.startswith(prefix) and STORED_ROTARY not in name]
        tensors = {name: _moved(tensor, device) for name, tensor in self.read(names).items()}
        self._check_finite(tensors)
        return {
            name.removeprefix(prefix): tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse NaN and inf, from which nothing right can be computed; on the device, where that costs nothing."""
        finite = {  # by the largest magnitude, which is NaN if anything is: one reading and nothing written
            name: torch.linalg.vector_norm(tensor, torch.inf).isfinite()
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        if finite and not torch.stack(list(finite.values())).all():
            name = next(name for name, verdict in finite.items() if not verdict)
            raise UserError(f"checkpoint: {self.folder / self.shard_of[name]}: {name} holds NaN or inf")

    def dtype(self) -> torch.dtype:
        """The dtype that the final norm, and by convention all else, is stored in."""
        return self.read([FINAL_NORM])[FINAL_NORM].dtype


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device."""
    if device.type != "cuda":
        return tensor.to(device)
    # Copies from memory that is not pinned keep other threads from launching kernels. One tensor at a time is pinned.
    moved = tensor.pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return moved


def header(file: Any, name: str) -> tuple[torch.Size, str]:
    """Shape and dtype (as safetensors calls it) of a tensor in an open file, without reading it."""
    part = file.get_slice(name)
    return torch.Size(part.get_shape()), part.get_dtype()
