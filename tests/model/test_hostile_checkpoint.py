"""A checkpoint from a stranger: refused by its file's name before anything is built, allocated, asked for or run."""

import json
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bisup_lightning.calibrate.measure import open_checkpoint
from bisup_lightning.cli import main
from bisup_lightning.errors import UserError
from bisup_lightning.model.checkpoint import INDEX, SINGLE
from tests.inputs import DEMO
from tests.tools import RTN

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sound(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def folder(sound, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(sound, tmp_path / "checkpoint")


@pytest.fixture
def nobody_there(monkeypatch):
    """Nobody who could answer a question on stdin."""

    class Nobody:
        def readline(self, *arguments):
            raise AssertionError("somebody is asked a question")

        read = readline

    monkeypatch.setattr(sys, "stdin", Nobody())


@pytest.fixture
def refusal(nobody_there):
    """`refusal(folder, "names", …)`: what is said when such a checkpoint is opened, which is before anything else."""

    def check(folder, *words):
        with pytest.raises(UserError) as caught:
            open_checkpoint(str(folder), torch.device("cpu"))
        line = str(caught.value)
        assert line.startswith("checkpoint: ")
        assert len(line) < 600
        for word in words:
            assert word in line
        return line

    return check


@pytest.fixture
def fit_refusal(nobody_there, fit_arguments, tmp_path, capsys):
    """The same of a whole `fit`: exit code 2, one line, no run directory."""

    def check(folder, *words):
        run = tmp_path / "run"
        capsys.readouterr()
        assert main(fit_arguments(folder, run, RTN)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1, captured.err
        for word in ("error: checkpoint: ", *words):
            assert word in captured.err
        assert not run.exists()

    return check


# --- headers ----------------------------------------------------------------------------------------------------------


def file_of(header, data=b"\0" * 256, size=None):
    """Bytes of a safetensors file; `size` is what it says of its header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(start, end, shape=(64,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HEADERS = {
    "a header longer than the file": file_of({NORM: tensor(0, 256)}, size=2**40),
    "a header of 2^64 - 1 bytes": file_of({NORM: tensor(0, 256)}, size=2**64 - 1),
    "no header": b"",
    "half a length": b"\x10\0\0",
    "an empty header": file_of(b""),
    "no JSON": file_of(b"{'model"),
    "no object": file_of(b"[1, 2]"),
    "no UTF-8": file_of(b'{"\xff\xfe": {}}'),
    "deep nesting": file_of(b"[" * 100_000),
    "an offset behind the end": file_of({NORM: tensor(0, 2**40, (2**38,))}),
    "offsets in the wrong order": file_of({NORM: tensor(256, 0)}),
    "negative offsets": file_of({NORM: tensor(-256, 0)}),
    "a hole": file_of({"a": tensor(0, 128, (32,)), NORM: tensor(192, 256, (16,))}),
    "overlapping tensors": file_of({"a": tensor(0, 256), NORM: tensor(0, 256)}),
    "another size than its shape": file_of({NORM: tensor(0, 256, (63,))}),
    "a shape of 2^80 numbers": file_of({NORM: tensor(0, 256, (2**40, 2**40))}),
    "a negative shape": file_of({NORM: tensor(0, 256, (-64,))}),
    "an unknown dtype": file_of({NORM: tensor(0, 256, dtype="F31")}),
    "bytes that belong to nobody": file_of({NORM: tensor(0, 128, (32,))}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused(refusal, folder, content):
    (folder / SINGLE).write_bytes(content)
    refusal(folder, SINGLE)


@pytest.mark.parametrize(
    "name", [NORM, "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(refusal, folder, name, dtype):
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / SINGLE, {"format": "pt"})
    refusal(folder, SINGLE, name, "quantized already")


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_a_shared_tensor_of_another_shape_is_refused(refusal, folder, name):
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / SINGLE, {"format": "pt"})
    refusal(folder, SINGLE, name, "config.json asks for")


@pytest.mark.parametrize("name", ["mlp.up_proj.weight_scale_inv", "self_attn.q_proj.bias", "input_layernorm.nonsense"])
def test_a_tensor_that_does_not_belong_in_a_block_is_refused(refusal, folder, name):
    """The scales of quantized weights, or a bias that config.json denies: ignored, they would spoil the result."""
    name = f"model.layers.0.{name}"
    save_file(load_file(folder / SINGLE) | {name: torch.zeros(64)}, folder / SINGLE, {"format": "pt"})
    refusal(folder, SINGLE, name, "does not belong")


# --- index ------------------------------------------------------------------------------------------------------------


INDICES = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "no map": "{}",
    "a map of pairs": '{"weight_map": [["model.norm.weight", "model.safetensors"]]}',
    "a map that is text": '{"weight_map": "model.norm.weight"}',
    "numbers for shards": '{"weight_map": {"model.norm.weight": 3}}',
    "lists for shards": '{"weight_map": {"model.norm.weight": ["a"]}}',
    "null for a shard": '{"weight_map": {"model.norm.weight": null}}',
    "a folder for a shard": '{"weight_map": {"model.norm.weight": "."}}',
    "a way out": '{"weight_map": {"model.norm.weight": "../model.safetensors"}}',
    "an absolute path": '{"weight_map": {"model.norm.weight": "/etc/passwd"}}',
    "a shard that is not there": '{"weight_map": {"model.norm.weight": "model-00009.safetensors"}}',
    "a name with a null": '{"weight_map": {"model.norm.weight": "a\\u0000b"}}',
    "an endless name": json.dumps({"weight_map": {NORM: "x" * 100_000}}),
    "deep nesting": "[" * 100_000,
}


@pytest.mark.parametrize("text", INDICES.values(), ids=INDICES)
def test_a_hostile_index_is_refused(refusal, folder, text):
    (folder / SINGLE).rename(folder.parent / f"{folder.name}.safetensors")
    (folder / INDEX).write_text(text)
    refusal(folder, INDEX)


def test_an_index_that_names_a_shard_for_what_it_lacks_is_refused(refusal, folder):
    (folder / SINGLE).rename(folder / "one.safetensors")
    names = [*load_file(folder / "one.safetensors"), "model.layers.2.mlp.up_proj.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))
    refusal(folder, "3 blocks")


# --- configuration ----------------------------------------------------------------------------------------------------


CONFIGURATIONS = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 10**30),
    ("num_hidden_layers", 1),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -2),
    ("num_hidden_layers", "two"),
    ("num_hidden_layers", None),
    ("num_hidden_layers", [2]),
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("hidden_size", 10**12),
    ("hidden_size", "64"),
    ("hidden_size", 63),
    ("hidden_size", None),
    ("hidden_size", {"a": 1}),
    ("intermediate_size", 0),
    ("intermediate_size", 10**15),
    ("intermediate_size", 95),
    ("num_attention_heads", 0),
    ("num_attention_heads", -4),
    ("num_attention_heads", 5),
    ("num_attention_heads", 10**9),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", -2),
    ("num_key_value_heads", 10**12),
    ("head_dim", 0),
    ("head_dim", -16),
    ("head_dim", 15),
    ("head_dim", 10**12),
    ("vocab_size", 0),
    ("vocab_size", -1),
    ("vocab_size", 10**15),
    ("vocab_size", 8191),
    ("vocab_size", 1e300),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", "small"),
    ("hidden_act", "eval"),
    ("hidden_act", 3),
    ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 10_000.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0, "partial_rotary_factor": 1e9}),
    ("rope_parameters", []),
    ("dtype", "float31"),
    ("dtype", "os.system"),
    ("model_type", "gpt2"),
    ("model_type", ["llama"]),
    ("model_type", None),
]


@pytest.mark.parametrize(("key", "value"), CONFIGURATIONS, ids=lambda value: str(value)[:24])
def test_an_absurd_configuration_is_refused(refusal, folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    line = refusal(folder)
    assert "config.json" in line or "architecture" in line


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 10, '{"a":' * 100_000, "[]", "3", "null", "\ud800", ""])
def test_a_configuration_that_is_none_is_refused(refusal, folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refusal(folder, "config.json")


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "stranger"])
def test_remote_code_is_not_run_and_nobody_is_asked(fit_refusal, folder, tmp_path, model_type):
    """A class of the checkpoint's own, under a name that is known or not; the vocabulary stops the known one."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass A: pass\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "configuration_own.A", "AutoModelForCausalLM": "modeling_own.A"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": maps}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.A", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    fit_refusal(folder, str(folder))
    assert not ran.exists()


def test_the_tokenizer_of_another_model_is_refused(fit_refusal, folder):
    """One word more than the model knows, and it occurs."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for word in list(vocabulary):
        vocabulary[word] += 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    fit_refusal(folder, "they belong to different models")


# --- all the way through ----------------------------------------------------------------------------------------------


def test_a_fit_refuses_a_hostile_checkpoint_in_one_line(fit_refusal, folder):
    """A file for each kind: index, configuration, header."""
    shard = (folder / SINGLE).rename(folder / "one.safetensors")
    (folder / INDEX).write_text(INDICES["a way out"])
    fit_refusal(folder, INDEX)
    (folder / INDEX).unlink()
    shard.rename(folder / SINGLE)
    config = (folder / "config.json").read_text()
    for key, value in (("num_hidden_layers", 10**9), ("hidden_size", "64"), ("rms_norm_eps", float("nan"))):
        (folder / "config.json").write_text(json.dumps(json.loads(config) | {key: value}))
        fit_refusal(folder, "config.json")
    (folder / "config.json").write_text(config)
    (folder / SINGLE).write_bytes(HEADERS["overlapping tensors"])
    fit_refusal(folder, SINGLE)
