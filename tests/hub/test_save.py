"""A run's model/ folder: loads with transformers, computes what the run evaluated, and is as small as promised."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from bisup_lightning.data.corpus import evaluation_tokens
from bisup_lightning.hub.load import open_quantized
from bisup_lightning.hub.quantizer import BisupConfig, BisupQuantizer
from bisup_lightning.model.blockwise import run_layer
from bisup_lightning.model.checkpoint import INDEX
from bisup_lightning.model.family import LINEAR_INPUTS
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.quant.spec import QuantSpec, Scheme
from tests.hub.conftest import RUNS
from tests.inputs import ROOT

CPU = torch.device("cpu")
every_run = pytest.mark.parametrize("name", RUNS)


def tokens(length=24, batch=2, seed=0):
    """Random tokens, none of them special."""
    return torch.randint(10, 8192, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def blockwise_logits(model, ids):
    """As the run evaluates: one block at a time behind the stored prompt."""
    prompt, quantizer = model.stored_prompt(), KVQuantizer.of(model.scheme)
    hidden, prompt_length = model.embed(ids), 0 if prompt is None else len(prompt.ids)
    for index, layer in model.layers():
        kv = BlockKV(quantizer, None if prompt is None else prompt.of_layer(index))
        hidden = run_layer(layer, hidden, model.positions(index, ids.shape[1], prompt_length), kv)
    return model.head()(hidden)


@torch.no_grad()
def logits_of(model, ids, **options):
    return model(input_ids=ids, **options).logits


def tensors_of(folder):
    """All tensors of a folder by name, each in one file alone."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        read = load_file(path)
        assert not tensors.keys() & read.keys()
        tensors |= read
    return tensors


# --- what it computes -------------------------------------------------------------------------------------------------


@every_run
def test_loaded_logits_are_the_runs_bit_for_bit(run_of, load, name):
    run_dir = run_of(name)
    wanted = blockwise_logits(open_quantized(run_dir / "model", CPU), tokens())
    assert torch.equal(logits_of(load(run_dir), tokens()), wanted)
    assert wanted.isfinite().all()


@every_run
def test_the_reported_perplexity_is_the_loaded_models(run_of, load, text_file, name):
    run_dir = run_of(name)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    ids = evaluation_tokens(str(text_file), tokenizer, 32, 4)
    logits = logits_of(load(run_dir), ids)[:, :-1].flatten(0, 1).double()
    perplexity = math.exp(F.cross_entropy(logits, ids[:, 1:].flatten()))
    reported = json.loads((run_dir / "results.json").read_text())["perplexity"][text_file.name]["quantized"]
    assert reported == pytest.approx(perplexity, rel=1e-5)


@every_run
def test_quantization_shows_and_stays_small(run_of, load, name):
    """Not the full-precision model in disguise, nor noise: logits differ, and agree in direction."""
    run_dir = run_of(name)
    settings = json.loads((run_dir / "manifest.json").read_text())["fingerprint"]
    assert settings
    model = load(run_dir)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint_behind(run_dir), dtype=torch.float32).eval()
    prompt = getattr(model, "prompt_kv", None)
    front = torch.empty(2, 0, dtype=torch.int64) if prompt is None else prompt.ids.expand(2, -1)
    wanted = logits_of(exact, torch.cat([front, tokens()], 1))[:, front.shape[1] :]
    likeness = F.cosine_similarity(logits_of(model, tokens()).flatten(), wanted.flatten(), 0)
    assert 0.5 < likeness < 0.99999


def checkpoint_behind(run_dir):
    """The folder that a run was made from."""
    line = next(line for line in (run_dir / "config.yaml").read_text().splitlines() if line.startswith("checkpoint:"))
    return line.split(":", 1)[1].strip()


def test_a_users_two_lines_are_enough(run_of):
    """A process that imports the package and transformers, nothing else."""
    run_dir = run_of("llama, bisup, text prompt")
    script = f"""
import bisup_lightning, torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(run_dir / "model")!r})
print(model(torch.arange(10, 20)[None]).logits.double().sum().item())
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    wanted = blockwise_logits(open_quantized(run_dir / "model", CPU), torch.arange(10, 20)[None]).double().sum().item()
    assert float(done.stdout.split()[-1]) == wanted


# --- what it holds ----------------------------------------------------------------------------------------------------


def linear_shapes(family):
    """[O, I] of every linear in the blocks, by its name inside."""
    shapes = family.layer_shapes(0)
    return {name: shapes[f"{name}.weight"] for entry in LINEAR_INPUTS for name in entry.linears}


@every_run
def test_no_full_precision_copy_of_a_quantized_weight(run_of, name):
    model = open_quantized(run_of(name) / "model", CPU)
    shapes = linear_shapes(model.family)
    smallest = min(rows * columns for rows, columns in shapes.values())
    outliers = model.scheme.outliers if model.scheme.outlier_bits is None else 0
    for key, tensor in tensors_of(run_of(name) / "model").items():
        if not key.startswith("model.layers.") or not tensor.is_floating_point():
            continue
        assert tuple(tensor.shape) not in {tuple(shape) for shape in shapes.values()}, key
        assert not key.endswith("weight") or "norm" in key, key
        if key.endswith("values"):  # QUIK's outliers, and no more than them
            assert outliers
            assert tensor.shape[1] == outliers
        else:
            assert tensor.numel() < smallest / 2, key


@every_run
def test_every_bit_is_accounted_for(run_of, name):
    """Codes at exactly N bits, one scale for each row and group, clip values, norms, orders, biases; nothing else."""
    folder = run_of(name) / "model"
    model = open_quantized(folder, CPU)
    scheme, family, width = model.scheme, model.family, model.storage_dtype.itemsize
    shapes, expected = family.layer_shapes(0), 0
    for rows, columns in linear_shapes(family).values():
        for segment in scheme.segments(columns, scheme.weights):
            if segment.spec is None:
                expected += rows * segment.columns * width
            else:
                expected += rows * math.ceil(segment.columns / 8) * segment.spec.bits
                expected += rows * segment.spec.groups(segment.columns) * width
    for entry in LINEAR_INPUTS:
        columns = shapes[f"{entry.linears[0]}.weight"][1]
        for segment in scheme.segments(columns, scheme.activations):
            expected += width * (1 if segment.spec is None else segment.spec.groups(segment.columns))
        expected += 4 * columns * bool(scheme.outliers and not entry.producers)
    small = [shape for key, shape in shapes.items() if "norm" in key or key.endswith("bias")]
    expected += width * sum(shape.numel() for shape in small)
    expected *= family.num_layers
    read = tensors_of(folder)
    got = sum(t.nbytes for key, t in read.items() if key.startswith("model.layers."))
    assert got == expected

    prompt = read.get("prompt_kv.ids")
    held = sum(t.nbytes for key, t in read.items() if key.startswith("prompt_kv.") and t.is_floating_point())
    assert held == (
        0 if prompt is None else 2 * family.num_layers * family.num_kv_heads * family.head_dim * len(prompt) * width
    )
    table = family.vocab_size * family.hidden_size * width
    shared = sum(t.nbytes for key, t in read.items() if not key.startswith(("model.layers.", "prompt_kv.")))
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert shared == table * (1 if tied else 2) + family.hidden_size * width
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert on_disk < got + held + shared + 40_000  # headers


@every_run
def test_floats_are_stored_in_the_checkpoints_own_dtype(run_of, name):
    stored = RUNS[name].overrides.get("dtype", torch.float32)
    read = tensors_of(run_of(name) / "model")
    assert {tensor.dtype for tensor in read.values() if tensor.is_floating_point()} == {stored}
    assert not list((run_of(name) / "model").glob("*.bin"))


@every_run
def test_index_and_configuration_describe_the_folder(run_of, name):
    folder = run_of(name) / "model"
    index = json.loads((folder / INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors_of(folder))
    for key, shard in index["weight_map"].items():
        with safe_open(folder / shard, framework="pt") as file:
            assert key in file.keys()  # noqa: SIM118  no mapping
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bisup"
    assert "torch_dtype" not in config
    assert not (folder.parent / "model.tmp").exists()
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}


def test_a_rotated_models_head_is_untied(run_of, load):
    """Its final norm is folded into the head, which therefore is no longer the embedding."""
    run_dir = run_of("llama, quarot, gptq, six heads, biases, tied")
    assert json.loads((run_dir / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    model = load(run_dir)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_a_tied_head_is_stored_once_and_stays_tied(run_of, load):
    run_dir = run_of("llama, rtn, stored bfloat16")
    assert "lm_head.weight" not in tensors_of(run_dir / "model")
    model = load(run_dir)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


# --- loading otherwise ------------------------------------------------------------------------------------------------


@every_run
def test_saved_again_by_transformers_it_is_the_same_model(run_of, load, tmp_path, name):
    model = load(run_of(name))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize(
    "name", ["llama, rtn, stored bfloat16", "qwen2, atom, gptq, groups", "mistral, quarot, rtn, window"]
)
def test_in_another_dtype_codes_stay_and_logits_are_near(run_of, load, name):
    plain, narrow = load(run_of(name)), load(run_of(name), dtype=torch.bfloat16)
    codes = {key: tensor for key, tensor in narrow.state_dict().items() if not tensor.is_floating_point()}
    assert codes
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in codes.items())
    logits = logits_of(narrow, tokens())
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float().flatten(), logits_of(plain, tokens()).flatten(), 0) > 0.8


def test_a_decoder_alone_is_refused(run_of):
    with pytest.raises(ValueError, match="loads as AutoModelForCausalLM"):
        AutoModel.from_pretrained(run_of("llama, bisup, text prompt") / "model")


BESIDE = [{"": "cpu", "model.layers.1": "disk"}, {"": "disk"}, {"": 0, "model.layers.1": "cpu"}]


@pytest.mark.parametrize("device_map", [*BESIDE, None, "auto", "cpu", {"": "cpu"}, {"": 0}, {"": 0, "lm_head": 1}])
def test_parts_that_lie_elsewhere_than_they_compute_are_refused(device_map):
    quantizer = BisupQuantizer(BisupConfig.of(Scheme(), 1))
    if device_map not in BESIDE:
        quantizer.validate_environment(device_map=device_map)
        return
    with pytest.raises(ValueError, match="device_map: a bisup model lies on GPUs"):
        quantizer.validate_environment(device_map=device_map)


def test_a_loaded_model_says_what_can_be_done_with_it(run_of, load):
    quantizer = load(run_of("qwen2, atom, gptq, groups")).hf_quantizer
    assert not quantizer.is_trainable
    assert quantizer.is_serializable()


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        Scheme(QuantSpec(3, group_size=128), None, None, hadamard=True),
        Scheme(QuantSpec(4, True, "tensor"), QuantSpec(8, True, "group", 64), QuantSpec(2, False, "token")),
        Scheme(outliers=128, outlier_bits=None),
    ],
)
def test_the_configuration_keeps_the_scheme_through_json(scheme):
    config = json.loads(json.dumps(BisupConfig.of(scheme, 5).to_dict()))
    again = BisupConfig(**config)
    assert again.read_scheme() == scheme
    assert again.prompt_length == 5
