"""Whole models: from safetensors alone, and without code of the checkpoint's own, whoever loads them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bisup_lightning.data.corpus import self_generated
from bisup_lightning.errors import UserError
from bisup_lightning.hub.generate import complete
from bisup_lightning.hub.load import load_behind_prompt, load_quantized
from bisup_lightning.model.checkpoint import INDEX, SINGLE
from bisup_lightning.model.whole import load_whole_model

CPU = torch.device("cpu")
LOADERS = {
    "plain": lambda folder: load_behind_prompt(folder, (), torch.float32, CPU),
    "behind a prompt": lambda folder: load_behind_prompt(folder, (0,), torch.float32, CPU),
    "quantized": lambda folder: load_quantized(folder, CPU),
    "to complete a text": lambda folder: complete(folder, "The river", 2, 0.0, CPU),
    "to sample text": lambda folder: self_generated(folder, 1, 4, 0, CPU),
}

each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def pickle_weights(folder, name):
    """Put a pickle that transformers can read in the place of the safetensors; the names of its tensors."""
    tensors = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(tensors, folder / name)
    (folder / SINGLE).unlink()
    return list(tensors)


@each_loader
def test_a_folder_of_pickles_alone_is_refused(make_checkpoint, load):
    folder = make_checkpoint()
    pickle_weights(folder, "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(folder)  # what is refused is no damage
    with pytest.raises(UserError, match=INDEX):
        load(folder)


@each_loader
def test_an_index_of_pickles_is_refused(make_checkpoint, load):
    folder = make_checkpoint()
    names = pickle_weights(folder, "shard.bin")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "shard.bin")}))
    AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)  # which it is not
    with pytest.raises(UserError, match=r"shard\.bin, which is no safetensors file"):
        load(folder)


@each_loader
def test_code_of_the_checkpoint_is_not_run(make_checkpoint, load, tmp_path):
    folder, trace = make_checkpoint(), tmp_path / "trace"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    load(folder)
    assert not trace.exists()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_it_computes_in_the_dtype_of_its_configuration_or_another(make_checkpoint, dtype):
    folder = make_checkpoint(dtype=torch.bfloat16)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))  # not what it is stored in
    model = load_whole_model(folder, CPU, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
    assert not model.training
