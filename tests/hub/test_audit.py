"""What is not the model that it should be is not published."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bisup_lightning.cli import main
from bisup_lightning.hub import save
from bisup_lightning.model.checkpoint import INDEX
from tests.inputs import fit_command
from tests.tools import RTN, Watch, contents, with_callback

BLOCK = "model-00001.safetensors"
WEIGHT = "model.layers.1.mlp.up_proj"


def alter(folder, shard, change):
    """Change the tensors of a shard; a hard link of it stays as it is."""
    tensors = load_file(folder / shard)
    change(tensors)
    (folder / shard).unlink()
    save_file(tensors, folder / shard, {"format": "pt"})


def name_in_index(folder, name, shard):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def a_block_is_missing(folder):
    (folder / BLOCK).unlink()


def a_block_is_another(folder):
    (folder / BLOCK).unlink()
    os.link(folder / "model-00000.safetensors", folder / BLOCK)


def a_bit_of_a_block_is_turned(folder):
    content = bytearray((folder / BLOCK).read_bytes())
    content[-1] ^= 1
    (folder / BLOCK).unlink()
    (folder / BLOCK).write_bytes(content)


def a_weight_lies_there_in_full_precision_too(folder):
    name = f"{WEIGHT}.weight"
    alter(folder, save.SHARED, lambda tensors: tensors.update({name: torch.zeros(96, 64)}))
    name_in_index(folder, name, save.SHARED)


def a_weight_lies_there_in_full_precision_and_the_index_does_not_say(folder):
    alter(folder, save.SHARED, lambda tensors: tensors.update({f"{WEIGHT}.weight": torch.zeros(96, 64)}))


def there_is_a_file_of_weights_too_many(folder):
    save_file({f"{WEIGHT}.weight": torch.zeros(96, 64)}, folder / "more.safetensors")


def a_shared_tensor_has_another_shape(folder):
    alter(folder, save.SHARED, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))


def a_shared_tensor_has_another_dtype(folder):
    alter(folder, save.SHARED, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).half()}))


def a_shared_tensor_is_missing(folder):
    alter(folder, save.SHARED, lambda tensors: tensors.pop("model.norm.weight"))


def the_configuration_is_no_json(folder):
    (folder / "config.json").write_text("{")


def the_configuration_names_no_quantizer(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def the_configuration_has_more_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def the_index_is_missing(folder):
    (folder / INDEX).unlink()


def a_logit_is_not_finite(folder):
    alter(folder, save.SHARED, lambda tensors: tensors["model.norm.weight"].fill_(3e38))


SPOILT = [
    a_block_is_missing, a_block_is_another, a_bit_of_a_block_is_turned, a_weight_lies_there_in_full_precision_too,
    a_weight_lies_there_in_full_precision_and_the_index_does_not_say, there_is_a_file_of_weights_too_many,
    a_shared_tensor_has_another_shape, a_shared_tensor_has_another_dtype, a_shared_tensor_is_missing,
    the_configuration_is_no_json, the_configuration_names_no_quantizer, the_configuration_has_more_layers,
    the_index_is_missing, a_logit_is_not_finite,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(make_checkpoint, text_file, tmp_path_factory):
    """A finished run, and the command."""
    run = tmp_path_factory.mktemp("whole") / "run"
    command = fit_command(make_checkpoint(), run, text_file, RTN, with_callback(Watch))
    assert main(command) == 0
    return run, command


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_folder_is_not_published(whole, spoil, tmp_path, monkeypatch, capsys):
    """The blocks are finished; nothing says that the model is, and the next run puts it together."""
    run, command = tmp_path / "run", [*whole[1], f"--run_dir={tmp_path / 'run'}"]
    shutil.copytree(whole[0], run)
    (run / "model" / "config.json").unlink()
    audit = save.audit

    def spoilt(folder, *arguments):
        spoil(folder)
        audit(folder, *arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(save, "audit", spoilt)
        assert main(command) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("nothing was published")
    assert str(run) in line
    manifest = json.loads((run / "manifest.json").read_text())
    assert not [name for name in manifest["files"] if name.startswith("model/") or name == "results.json"]
    assert not list((run / "model").glob("*"))
    Watch.fresh()
    assert main(command) == 0
    assert not Watch.results
    assert contents(run / "model") == contents(whole[0] / "model")


def test_a_published_model_holds_no_float_weight_of_a_linear(whole):
    """Judged by the files alone."""
    names = set()
    for path in (whole[0] / "model").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    assert not [name for name in names if name.endswith("proj.weight")]
    assert len([name for name in names if name.endswith("codes") or ".segments." in name]) >= 14
