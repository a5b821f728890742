"""A model computed one block at a time is the model that transformers computes at once."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bisup_lightning.model.blockwise import BlockwiseModel, run_layer
from bisup_lightning.model.checkpoint import Checkpoint
from bisup_lightning.model.kv import BlockKV

CPU = torch.device("cpu")
VOCABULARY, LENGTH = 64, 24
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}
MODELS = {
    "llama, grouped queries": ("llama", {}),
    "llama, a key for each query": ("llama", {"num_key_value_heads": 4}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 24}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 64,
        },
    ),
    "llama, dynamic rope beyond its length": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, short window": ("mistral", {"sliding_window": 8}),
    "mistral, long window": ("mistral", {"sliding_window": 4096}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, five heads": ("qwen2", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "qwen2, short window in some layers": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, short window in some layers": ("qwen3", {"head_dim": 32, **WINDOW}),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="session")
def checkpoint_of(make_checkpoint):
    """The folder of one of MODELS, made once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            kind, overrides = MODELS[name]
            folders[name] = make_checkpoint(kind, vocab_size=VOCABULARY, **overrides)
        return folders[name]

    return folder_of


def tokens(length=LENGTH, batch=2, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def blockwise_logits(model, ids):
    hidden = model.embed(ids)
    for index, layer in model.layers():
        hidden = run_layer(layer, hidden, model.positions(index, ids.shape[1], 0), BlockKV())
    return model.head()(hidden)


@torch.no_grad()
def whole_logits(folder, ids, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits


# --- logits -----------------------------------------------------------------------------------------------------------


@every_model
def test_logits_are_transformers_own_bit_for_bit(checkpoint_of, name):
    folder, ids = checkpoint_of(name), tokens()
    logits = blockwise_logits(BlockwiseModel(folder, CPU), ids)
    assert torch.equal(logits, whole_logits(folder, ids))
    assert logits.std() > 0.01


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_in_the_checkpoints_dtype_and_in_float32(make_checkpoint, kind, stored):
    folder, ids = make_checkpoint(kind, dtype=stored, vocab_size=VOCABULARY), tokens()
    as_stored, wide = BlockwiseModel(folder, CPU), BlockwiseModel(folder, CPU, torch.float32)
    assert as_stored.dtype == as_stored.storage_dtype == wide.storage_dtype == stored
    assert torch.equal(blockwise_logits(as_stored, ids), whole_logits(folder, ids))
    assert torch.equal(blockwise_logits(wide, ids), whole_logits(folder, ids, torch.float32))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_of_a_sharded_checkpoint(make_checkpoint, kind):
    """Blocks split over shards, and several blocks in one."""
    folder = make_checkpoint(kind, vocab_size=VOCABULARY, max_shard_size="30KB", num_hidden_layers=3)
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert torch.equal(blockwise_logits(BlockwiseModel(folder, CPU), tokens()), whole_logits(folder, tokens()))


def test_logits_of_a_configuration_from_before_transformers_5(make_checkpoint):
    """Old files say rope_theta, rope_scaling and torch_dtype."""
    folder = make_checkpoint("llama", dtype=torch.bfloat16, vocab_size=VOCABULARY, rope_parameters=LLAMA3)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    new = blockwise_logits(BlockwiseModel(folder, CPU), tokens())
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    path.write_text(json.dumps(config))
    old = BlockwiseModel(folder, CPU)
    assert old.dtype == torch.bfloat16
    assert torch.equal(blockwise_logits(old, tokens()), new)


def test_a_window_that_the_architecture_ignores_is_ignored(make_checkpoint):
    """Llama-like files converted from Mistral's may carry a sliding_window."""
    folder = make_checkpoint("llama", vocab_size=VOCABULARY, sliding_window=8)
    torch.testing.assert_close(blockwise_logits(BlockwiseModel(folder, CPU), tokens()), whole_logits(folder, tokens()))


def test_embed_reads_one_table_and_computes_in_the_models_dtype(make_checkpoint):
    folder = make_checkpoint("llama", dtype=torch.bfloat16, vocab_size=VOCABULARY)
    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    for dtype in (torch.float32, torch.bfloat16):
        hidden = BlockwiseModel(folder, CPU, dtype).embed(tokens())
        assert hidden.dtype == dtype
        assert torch.equal(hidden, table[tokens()].to(dtype))
    assert BlockwiseModel(folder, CPU).embed(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, 64)  # no prompt


def test_one_block_is_read_at_a_time(make_checkpoint, monkeypatch):
    """Block k reads its own tensors, no others, and nothing keeps them."""
    folder = make_checkpoint("qwen2", vocab_size=VOCABULARY, num_hidden_layers=3)
    model, asked, read = BlockwiseModel(folder, CPU), [], Checkpoint.read

    def watch(self, names):
        names = list(names)
        asked.append(names)
        return read(self, names)

    monkeypatch.setattr(Checkpoint, "read", watch)
    for index, _ in model.layers():
        assert len(asked) == index + 1
        assert {name.split(".")[2] for name in asked[-1]} == {str(index)}


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if "dynamic" not in name])  # whose frequencies change
@pytest.mark.parametrize("prompt_length", [1, 5])
def test_a_prompt_in_front_is_a_full_pass_over_prompt_and_text(checkpoint_of, name, prompt_length):
    """Keys and values from `encode_prompt` stand for the prompt: logits of the text and of the prompt are the same."""
    model, ids = BlockwiseModel(checkpoint_of(name), CPU), tokens(batch=1)
    text_length = LENGTH - prompt_length
    prompt, text = model.embed(ids[:, :prompt_length]), model.embed(ids[:, prompt_length:])
    with torch.no_grad():
        for index, layer in model.layers():
            prompt, kv = model.encode_prompt(index, layer, prompt)
            text = run_layer(layer, text, model.positions(index, text_length, prompt_length), BlockKV(None, kv))
        logits = model.head()(torch.cat([prompt, text], 1))
    wanted = whole_logits(checkpoint_of(name), ids)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_positions_are_made_once_for_all_batches_of_a_shape(checkpoint_of):
    model = BlockwiseModel(checkpoint_of("llama, grouped queries"), CPU)
    assert model.positions(0, 8, 2) is model.positions(1, 8, 2)
    assert model.positions(0, 8, 2) is not model.positions(0, 8, 3)
    narrow = model.positions(0, 8, 2)
    model.dtype = torch.bfloat16  # what the BF16 callback does
    assert model.positions(0, 8, 2).rotary[0].dtype == torch.bfloat16
    assert narrow.rotary[0].dtype == torch.float32


def test_a_window_hides_what_lies_further_back(checkpoint_of):
    """Only where the sequence outgrows the window, the prompt counted, is a mask needed at all."""
    model = BlockwiseModel(checkpoint_of("mistral, short window"), CPU)
    assert model.positions(0, 8, 0).mask is None
    mask = model.positions(0, 8, 2).mask[0, 0]
    for t in range(8):
        seen = mask[t].nonzero().flatten().tolist()
        assert seen == list(range(max(0, t + 2 - 7), t + 3))
