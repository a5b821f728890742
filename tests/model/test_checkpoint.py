"""Reading a checkpoint's folder: every tensor as it lies there, and one line for everything that can be wrong."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bisup_lightning.errors import UserError
from bisup_lightning.model.blockwise import BlockwiseModel
from bisup_lightning.model.checkpoint import INDEX, SINGLE, Checkpoint, resolve
from bisup_lightning.model.family import EMBEDDING, FINAL_NORM, HEAD

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(make_checkpoint):
    """A checkpoint in one file."""
    return make_checkpoint("qwen2", dtype=torch.bfloat16, vocab_size=64)


@pytest.fixture(scope="module")
def sharded(make_checkpoint):
    """The same in many."""
    return make_checkpoint("qwen2", dtype=torch.bfloat16, vocab_size=64, max_shard_size="20KB")


@pytest.fixture
def copy_of(tmp_path):
    """A copy that a test may damage."""

    def copy(folder):
        return shutil.copytree(folder, tmp_path / "checkpoint")

    return copy


def refusal(action):
    """The one line that it ends in."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("checkpoint: ")
    return message


# --- reading ----------------------------------------------------------------------------------------------------------


def test_shards_or_not_the_tensors_are_those_of_the_files(whole, sharded):
    wanted = load_file(whole / SINGLE)
    for folder in (whole, sharded):
        checkpoint = Checkpoint(folder)
        assert set(checkpoint.shard_of) == set(wanted)
        assert all(name in checkpoint for name in wanted)
        assert "model.layers.9.mlp.up_proj.weight" not in checkpoint
        read = checkpoint.read(wanted)
        assert all(torch.equal(read[name], wanted[name]) and read[name].dtype == torch.bfloat16 for name in wanted)
        assert checkpoint.dtype() == torch.bfloat16
    assert Checkpoint(whole).shards == [whole / SINGLE]
    assert Checkpoint(sharded).shards == sorted(sharded.glob("*.safetensors"))


def test_read_layer_gives_one_blocks_tensors_by_their_name_inside(sharded, whole):
    wanted = load_file(whole / SINGLE)
    prefix = "model.layers.1."
    for dtype in (None, torch.float32):
        read = Checkpoint(sharded).read_layer(1, CPU, dtype)
        assert {prefix + name for name in read} == {name for name in wanted if name.startswith(prefix)}
        for name, tensor in read.items():
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor, wanted[prefix + name].to(tensor.dtype))


def test_block_1_is_not_block_10(make_checkpoint):
    folder = make_checkpoint("llama", vocab_size=64, num_hidden_layers=11, hidden_size=16, intermediate_size=16)
    wanted = load_file(folder / SINGLE)
    for index in (1, 10):
        read = Checkpoint(folder).read_layer(index, CPU)
        assert len(read) == 9
        assert torch.equal(read["mlp.up_proj.weight"], wanted[f"model.layers.{index}.mlp.up_proj.weight"])


def test_integers_keep_their_dtype(tmp_path):
    save_file({"model.layers.0.order": torch.arange(3), "model.layers.0.w": torch.ones(3)}, tmp_path / SINGLE)
    read = Checkpoint(tmp_path).read_layer(0, CPU, torch.bfloat16)
    assert read["order"].dtype == torch.int64
    assert read["w"].dtype == torch.bfloat16


def test_a_tied_or_absent_head_is_the_embedding(whole, make_checkpoint):
    assert Checkpoint(whole).head_name(tied=False) == HEAD
    assert Checkpoint(whole).head_name(tied=True) == EMBEDDING
    tied = Checkpoint(make_checkpoint("llama", vocab_size=64, tie_word_embeddings=True))
    assert HEAD not in tied
    assert tied.head_name(tied=True) == tied.head_name(tied=False) == EMBEDDING
    norm = tied.read_shared(FINAL_NORM, CPU, torch.float64)
    assert norm.dtype == torch.float64


def test_resolve_takes_a_folder_as_it_is(whole, sharded):
    assert resolve(str(whole)) == whole
    assert resolve(str(sharded)) == sharded


# --- refusals of the folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "../x"])
def test_a_missing_folder_is_refused(name):
    assert name in refusal(lambda: resolve(name))


def test_a_folder_without_a_configuration_is_refused(copy_of, whole):
    folder = copy_of(whole)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(lambda: resolve(str(folder)))


def test_a_folder_without_weights_is_refused(copy_of, whole):
    folder = copy_of(whole)
    (folder / SINGLE).unlink()
    message = refusal(lambda: resolve(str(folder)))
    assert "no weights" in message
    assert SINGLE in message


def test_a_folder_with_pickles_only_is_refused_unread(copy_of, whole):
    folder = copy_of(whole)
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    message = refusal(lambda: resolve(str(folder)))
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


# --- refusals of the index --------------------------------------------------------------------------------------------


def rewrite_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index)))


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "absent.safetensors", ".."]
)
def test_an_index_that_points_outside_its_folder_or_to_nothing_is_refused(copy_of, sharded, shard):
    folder = copy_of(sharded)
    save_file({FINAL_NORM: torch.zeros(64)}, folder.parent / "evil.safetensors")
    (folder / "sub").mkdir()
    save_file({FINAL_NORM: torch.zeros(64)}, folder / "sub" / "x.safetensors")
    rewrite_index(folder, lambda index: {**index, "weight_map": {**index["weight_map"], FINAL_NORM: shard}})
    message = refusal(lambda: Checkpoint(folder))
    assert shard in message
    assert INDEX in message


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', "\x00"])
def test_a_damaged_index_is_refused(copy_of, sharded, text):
    folder = copy_of(sharded)
    (folder / INDEX).write_text(text)
    assert INDEX in refusal(lambda: Checkpoint(folder))


def test_an_index_whose_shards_are_no_names_is_refused(copy_of, sharded):
    folder = copy_of(sharded)
    rewrite_index(folder, lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 7)})
    assert INDEX in refusal(lambda: Checkpoint(folder))


# --- refusals of the tensors ------------------------------------------------------------------------------------------


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated header": data[:100],
            "truncated data": data[:-10],
            "absurd header length": b"\xff" * 8 + data[8:],
            "header that is no JSON": data[:8] + b"{" * 20 + data[28:],
            "not safetensors at all": b"<html>Access denied</html>",
        }[how]
    )


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "truncated header",
        "truncated data",
        "absurd header length",
        "header that is no JSON",
        "not safetensors at all",
    ],
)
def test_a_damaged_shard_is_named(copy_of, whole, sharded, how):
    folder = copy_of(whole)
    damage(folder / SINGLE, how)
    assert SINGLE in refusal(lambda: Checkpoint(folder))

    shutil.rmtree(folder)
    folder = copy_of(sharded)
    shard = Checkpoint(folder).shard_of["model.layers.1.mlp.up_proj.weight"]
    damage(folder / shard, how)
    checkpoint = Checkpoint(folder)  # opens no shard
    assert shard in refusal(lambda: checkpoint.read_layer(1, CPU))


def test_a_tensor_that_its_shard_lacks_is_refused(copy_of, sharded):
    folder = copy_of(sharded)
    other = sorted(folder.glob("*.safetensors"))[-1].name
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite_index(folder, lambda index: {"weight_map": {**index["weight_map"], name: other}})
    message = refusal(lambda: Checkpoint(folder).read_layer(0, CPU))
    assert other in message
    assert name in message


def test_a_tensor_that_nothing_holds_is_refused(whole):
    assert re.search("no tensor model.nothing", refusal(lambda: Checkpoint(whole).read(["model.nothing"])))


def rewrite_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_a_block_that_lacks_a_tensor_is_refused(copy_of, whole):
    folder = copy_of(whole)
    rewrite_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    assert "model.layers.0.self_attn.q_proj.weight" in refusal(lambda: BlockwiseModel(folder, CPU).layer(0))


def test_a_configuration_of_another_size_is_refused(copy_of, whole):
    folder = copy_of(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    assert "mlp" in refusal(lambda: BlockwiseModel(folder, CPU).layer(0))


def test_rotary_frequencies_that_old_checkpoints_store_are_ignored(copy_of, whole):
    """The index of Llama 2 lists self_attn.rotary_emb.inv_freq in every block; transformers ignores it."""
    folder = copy_of(whole)
    wanted = BlockwiseModel(folder, CPU).layer(0).state_dict()
    rewrite_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    got = BlockwiseModel(folder, CPU).layer(0).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
