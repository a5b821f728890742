"""What a user meets: a mistake ends in exit code 2 and one line that names the key or the file, before any work."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bisup_lightning.cli import main
from bisup_lightning.configuration import TRUST
from bisup_lightning.parsers import build_parser
from main import HELP
from tests.inputs import ROOT
from tests.tools import GPTQ, RTN, Interrupt, Interrupted, contents, traces, with_callback

ATOM = "--transform=bisup_lightning.transform.reorder.Atom"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def altered(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(checkpoint, tmp_path / "altered")


@pytest.fixture(scope="module")
def finished(make_checkpoint, text_file, tmp_path_factory):
    """A finished run with the command that made it."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    command = [
        "fit", f"--config={ROOT / 'configs' / 'base.yaml'}", f"--checkpoint={make_checkpoint()}", f"--run_dir={run}",
        f"--data.calibration={text_file}", "--data.num_samples=8", "--data.seq_len=32", "--data.batch_size=4",
        f"--evaluation.perplexity=[{text_file}]", "--evaluation.max_chunks=4", "--trainer.accelerator=cpu",
        "--trainer.logger=false", RTN,
    ]  # fmt: skip
    assert main(command) == 0
    return run, command


@pytest.fixture
def refused(capsys):
    """`refused(arguments, "names", "these", …)`: the line, after checking code, traceback and words."""

    def check(arguments, *words):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        for word in words:
            assert word in lines[0]
        return lines[0]

    return check


@pytest.fixture
def fit_refused(refused, fit_arguments, tmp_path):
    """The same for a `fit` that must not even make its run directory."""

    def check(checkpoint, arguments, *words):
        run = tmp_path / "never"
        line = refused(fit_arguments(checkpoint, run, *arguments), *words)
        assert not run.exists()
        return line

    return check


# --- values and keys --------------------------------------------------------------------------------------------------

SAVES_EVERY = "--trainer.callbacks=[{{class_path: callbacks.checkpoint.BlockCheckpoint, init_args: {{{}}}}}]"
IMPOSSIBLE = [
    ("--precision.weights.bits=1", "precision.weights.bits"),
    ("--precision.weights.bits=9", "precision.weights.bits"),
    ("--precision.activations.bits=1", "precision.activations.bits"),
    ("--precision.kv.bits=9", "precision.kv.bits"),
    ("--precision.weights.group_size=-8", "precision.weights.group_size"),
    ("--precision.weights.group_size=48", "precision.weights"),
    ("--precision.activations.group_size=48", "precision.activations"),
    ("--precision.weights.symmetric=false", "precision.weights.symmetric"),
    ("--precision.weights.granularity=head", "precision.weights.granularity"),
    ("--precision.kv.granularity=row", "precision.kv.granularity"),
    ("--precision.kv.group_size=32", "precision.kv.group_size"),
    ("--data.num_samples=-1", "data.num_samples"),
    ("--data.num_samples=0", "data.num_samples"),
    ("--data.seq_len=-32", "data.seq_len"),
    ("--data.seq_len=1", "data.seq_len must be at least 2"),
    ("--data.seq_len=513", "data.seq_len: 513", "512 positions"),
    ("--evaluation.seq_len=513", "evaluation.seq_len: 513", "512 positions"),
    ("--data.batch_size=0", "data.batch_size"),
    ("--evaluation.max_chunks=-2", "evaluation.max_chunks"),
    ("--evaluation.batch_size=0", "evaluation.batch_size"),
    ("--evaluation.zero_shot_limit=1", "evaluation.zero_shot_limit"),
    ("--evaluation.devices=0", "evaluation.devices"),
    ("--evaluation.seq_len=0", "evaluation.seq_len"),
    ("--evaluation.seq_len=1", "evaluation.seq_len"),  # nothing to predict: a perplexity of NaN
    ("--solver.epochs=0", "solver.epochs"),
    ("--solver.epochs=-1", "solver.epochs"),
    ("--solver.fp_epochs=5", "solver.fp_epochs"),
    ("--solver.fp_epochs=-1", "solver.fp_epochs"),
    ("--solver.activation_clip=0", "solver.activation_clip"),
    ("--solver.activation_clip=1.5", "solver.activation_clip"),
    ("--solver.theta.rank=0", "rank"),
    ("--solver.theta.rank=-3", "rank"),
    ("--solver.theta.rank=65", "solver.theta.rank: 65 is above 64"),
    ("--solver.optimization.clip_lr=-1", "clip_lr"),
    ("--solver.optimization.low_rank_lr=-0.1", "low_rank_lr"),
    ("--solver.optimization.weight_decay=-1", "weight_decay"),
    ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val"),
    ("--trainer.profiler=foo", "trainer", "profiler"),
    ("--trainer.limit_train_batches=-1", "trainer", "limit_train_batches"),
    ("--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "trainer", "ModelCheckpoint"),
    ("--seed=99999999999999999999999", "seed"),
    ("--prompt.kind=text", "prompt.text"),
    ("--prompt.text=hello", "prompt.text", "prompt.kind"),
    (SAVES_EVERY.format("every_n_seconds: -1"), "trainer.callbacks", "every_n_seconds"),
    (SAVES_EVERY.format("streams_every_n_seconds: .nan"), "trainer.callbacks", "streams_every_n_seconds"),
]
WRONG = [
    ("--data.num_samples=abc", "data.num_samples"),
    ("--data.num_samples=2.5", "data.num_samples"),
    ("--seed=abc", "seed"),
    ("--precision.weights.bits=four", "precision.weights.bits"),
    ("--precision.weights.granularity=foo", "precision.weights.granularity"),
    ("--evaluation.perplexity=wikitext2", "evaluation.perplexity"),
    ("--prompt.kind=foo", "prompt.kind"),
    ("--solver.optimization.schedule=linear", "optimization.schedule"),
    ("--solver.theta.smoothing=foo", "theta.smoothing"),
    ("--trainer.logger=foo", "trainer.logger"),
    ("--trainer.gradient_clip_val=abc", "trainer.gradient_clip_val"),
    ("--data.nonsense=3", "data.nonsense"),
    ("--data.num_sample=8", "no key data.num_sample; did you mean data.num_samples?"),  # not taken for it, either
    ("--evaluation.m=1", "no key evaluation.m"),
    ("--solver.epoch=3", "solver: there is no key epoch; did you mean epochs?"),
    ("--solver.theta.rnk=3", "solver: there is no key theta.rnk; did you mean theta.rank?"),
    ("--nonsense=3", "nonsense"),
    ("--solver.nonsense=3", "nonsense"),
    ("--transform.nonsense=3", "nonsense"),
    ("--trainer.max_epochs=3", "trainer.max_epochs"),
    ("--solver=bisup_lightning.calibrate.solvers.Nope", "solver", "Nope"),
    ("--solver=Nope", "solver: Nope is no known class"),
    ("--solver=null", "solver: none is given", "configs/base.yaml"),
    ("--solver.theta=null", "solver.theta: must not be null"),
    ("--solver.optimization=null", "solver.optimization: must not be null"),
    ("--transform=null", "transform", "None"),
    ("--solver=no.such.module.Solver", "solver", "no.such.module"),
    ("--solver=torch.nn.Linear", "solver: torch.nn.Linear is not trusted", "--trust_classes_from torch.nn"),
    ("--transform=Nope", "transform: Nope is no known class"),
    ("--trainer.callbacks+=Nope", "trainer.callbacks", "Nope"),
    ("--config=/no/such.yaml", "/no/such.yaml"),
]


@pytest.mark.parametrize(("argument", "words"), [(first, rest) for first, *rest in IMPOSSIBLE + WRONG])
def test_a_bad_value_or_key_is_named(fit_refused, checkpoint, argument, words):
    fit_refused(checkpoint, [argument], *words)


@pytest.mark.parametrize(
    "argument",
    ["--precision.kv.bits=9", "--solver.epochs=0", "--solver.activation_clip=0", "--solver=Nope", "--trainer.logger=x"],
)
def test_the_line_is_written_for_a_person(fit_refused, checkpoint, argument):
    """Not a dump of types that were tried and of everything else that was configured."""
    line = fit_refused(checkpoint, [argument])
    assert "Union subtypes" not in line
    assert "Namespace(" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {nonsense: 3}\n", ["data.nonsense"]),
        ("nonsense: 3\n", ["nonsense"]),
        ("data: {num_sample: 3}\n", ["data.num_sample; did you mean data.num_samples?"]),
        ("data: {num_samples: many}\n", ["data.num_samples"]),
        ("solver: {class_path: Nope}\n", ["solver", "Nope"]),
        ("solver: {init_args: {epoch: 3}}\n", ["solver", "epoch; did you mean epochs?"]),
        ("precision: {weights: null}\n", ["precision.weights: must not be null"]),
        ("data: [1,\n b\n", ["line 3"]),
        ("- 1\n- 2\n", []),
        ("", ["holds no keys"]),
        ("# nothing\n", ["holds no keys"]),
        ("seed: 1\ndata: {seq_len: 3, num_samples: 4, seq_len: 5}\n", ["seq_len is given more than once", "line 2"]),
    ],
)
def test_a_bad_file_is_refused_by_its_name(fit_refused, checkpoint, tmp_path, text, words):
    """Also where several files compose."""
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_text(text)
    good.write_text("seed: 3\n")
    fit_refused(checkpoint, [f"--config={good}", f"--config={bad}", f"--config={good}"], "config: ", str(bad), *words)


@pytest.mark.parametrize("name", ["Atom", "QuaRot", "NoTransform"])
def test_a_transform_is_known_by_its_name_alone(name):
    """As a solver is."""
    options = ["fit", "--checkpoint=model", "--run_dir=run", f"--transform={name}"]
    assert build_parser().parse_args(options).fit.transform.class_path.endswith(f".{name}")


def test_a_missing_solver_is_answered_with_a_configuration_that_has_one(refused, checkpoint, tmp_path):
    given = ["fit", f"--checkpoint={checkpoint}", f"--run_dir={tmp_path / 'never'}", "--data.calibration=self"]
    refused(given, "solver: none is given", "configs/base.yaml", "BiSup")
    assert not (tmp_path / "never").exists()


def test_nothing_to_learn_is_refused(fit_refused, checkpoint):
    """BiSup without any part of Θ is rounding: the user means another solver."""
    theta = '--solver.theta={"clip": false, "smoothing": "none", "low_rank": "none"}'
    fit_refused(checkpoint, [theta], "solver.theta")


@pytest.mark.parametrize("part", ["smoothing", "low_rank"])
def test_a_part_of_theta_can_be_left_out_by_its_own_argument(checkpoint, fit, tmp_path, part):
    run = fit(checkpoint, tmp_path / "run", f"--solver.theta.{part}=none", "--solver.epochs=1")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["solver"]["init_args"]["theta"][part] == "none"


def test_a_run_without_the_callback_that_saves_blocks_says_so_first(fit_refused, checkpoint):
    fit_refused(checkpoint, ["--trainer.callbacks=null"], "callbacks")


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/model", "no-such-model", "./no-such", "a/b/c"])
def test_a_missing_model_is_refused(fit_refused, name):
    fit_refused(name, [], "checkpoint", name)


def test_a_hub_that_cannot_be_reached_is_told_of_with_the_model(fit_refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fit_refused("nobody/no-such-model", [], "checkpoint", "nobody/no-such-model", "can't be reached")


@pytest.mark.parametrize(("kind", "word"), [(GatedRepoError, "gated"), (RepositoryNotFoundError, "no model")])
def test_a_refusal_of_the_hub_is_told_of_with_the_model(fit_refused, monkeypatch, kind, word):
    def refuse(*arguments, **settings):
        response = SimpleNamespace(headers={}, request=None, status_code=404)  # whatever library made it
        raise kind("404 Client Error.\n\nCannot access repository.\nPlease log in.", response=response)

    monkeypatch.setattr("bisup_lightning.model.checkpoint.snapshot_download", refuse)
    fit_refused("someone/model", [], "checkpoint", "someone/model", word)


def test_an_unknown_architecture_names_the_known_ones(fit_refused, tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    fit_refused(tmp_path / "gpt2", [], "checkpoint", "gpt2", "llama, mistral, qwen2, qwen3")


def test_pickled_weights_are_not_read(fit_refused, altered):
    (altered / WEIGHTS).rename(altered / "pytorch_model.bin")
    fit_refused(altered, [], "checkpoint", "pytorch_model.bin", "safetensors")


def test_a_checkpoint_without_weights_is_refused(fit_refused, altered):
    (altered / WEIGHTS).unlink()
    fit_refused(altered, [], "checkpoint", "no weights")


def test_a_checkpoint_without_a_tokenizer_is_refused(fit_refused, altered):
    for file in altered.glob("tokenizer*"):
        file.unlink()
    line = fit_refused(altered, [], "checkpoint", "tokenizer", str(altered))
    assert not line.endswith(":")  # a sentence that has lost its end


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_tokenizer_is_refused(fit_refused, altered, text):
    (altered / "tokenizer.json").write_text(text)
    fit_refused(altered, [], "checkpoint", "tokenizer")


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonsense"}'])
def test_a_damaged_configuration_is_refused(fit_refused, altered, text):
    (altered / "config.json").write_text(text)
    fit_refused(altered, [], "checkpoint", str(altered))


def change_configuration(folder, **settings):
    """Set entries of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("calibration", ["self", None])
@pytest.mark.parametrize("method", ["gptq", "bisup"])
def test_a_configuration_that_calls_its_weights_quantized_is_refused(
    fit_refused, altered, text_file, method, calibration
):
    change_configuration(altered, quantization_config={"quant_method": method, "bits": 4})
    arguments = [f"--data.calibration={calibration or text_file}"]
    fit_refused(altered, arguments, "checkpoint", str(altered / "config.json"), f"quantization_config ({method})")


@pytest.mark.parametrize("token", [8192, -1])
@pytest.mark.parametrize("key", ["data.calibration=self", "evaluation.perplexity=[self]"])
def test_a_first_token_that_the_model_does_not_know_is_refused(fit_refused, altered, key, token):
    change_configuration(altered, bos_token_id=token)
    fit_refused(altered, [f"--{key}"], key.split("=")[0], "bos_token_id", str(token), "8191")


def test_positions_that_are_stretched_count(fit_refused, altered):
    stretched = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    change_configuration(altered, max_position_embeddings=128, rope_parameters=stretched)
    fit_refused(altered, ["--data.seq_len=513"], "data.seq_len: 513", "512 positions")
    fit_refused(altered, ["--data.seq_len=512", "--blocks=0:1"], "blocks")  # refused for what comes behind it


def test_a_truncated_file_of_weights_is_refused(fit_refused, altered):
    content = (altered / WEIGHTS).read_bytes()
    (altered / WEIGHTS).write_bytes(content[: len(content) // 2])
    fit_refused(altered, [], "checkpoint", WEIGHTS)


def test_a_missing_shard_is_refused(fit_refused, make_checkpoint):
    folder = make_checkpoint(max_shard_size="300KB")
    shard = max(folder.glob("model-*.safetensors"))
    shard.unlink()
    fit_refused(folder, [], "checkpoint", shard.name)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_shows_before_the_work(fit_refused, altered, name):
    tensors = load_file(altered / WEIGHTS)
    del tensors[name]
    save_file(tensors, altered / WEIGHTS, {"format": "pt"})
    fit_refused(altered, [], "checkpoint", name)


def test_a_tensor_of_another_shape_shows_before_the_work(fit_refused, altered):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(altered / WEIGHTS) | {name: torch.zeros(5, 7)}
    save_file(tensors, altered / WEIGHTS, {"format": "pt"})
    fit_refused(altered, [], "checkpoint", name)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(fit_refused, make_checkpoint):
    fit_refused(make_checkpoint(vocab_size=4096), [], "checkpoint", "token", "4096")


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_text_shorter_than_two_sequences_is_refused(fit_refused, checkpoint, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("the " * 60)
    line = fit_refused(checkpoint, [f"--data.calibration={file}"], "data.calibration", "data.seq_len", str(file))
    assert "64" in line


def test_an_evaluation_text_shorter_than_one_chunk_is_refused(fit_refused, checkpoint, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("the " * 10)
    fit_refused(checkpoint, [f"--evaluation.perplexity=[{file}]"], "evaluation.perplexity", str(file), "32")


@pytest.mark.parametrize("source", ["/no/such.txt", "wikitext-3", "text.docx"])
def test_an_unknown_calibration_text_is_refused(fit_refused, checkpoint, source):
    fit_refused(checkpoint, [f"--data.calibration={source}"], "data.calibration", source)


@pytest.mark.parametrize("source", ["/no/such.txt", "wikitext-3", "text.docx"])
def test_an_unknown_evaluation_text_is_refused(fit_refused, checkpoint, text_file, source):
    fit_refused(checkpoint, [f"--evaluation.perplexity=[{text_file},{source}]"], "evaluation.perplexity", source)


@pytest.mark.parametrize("key", ["data.calibration", "evaluation.perplexity"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no_field.jsonl", b'{"text": "a"}\n{"words": "b"}\n', ["line 2", "text"]),
        ("no_string.jsonl", b'{"text": 3}\n', ["text"]),
        ("no_json.jsonl", b"hello\n", ["line 1"]),
        ("empty.txt", b"", []),
        ("no_utf8.txt", b"\xff\xfe words" * 100, []),
        ("no.parquet", b"nonsense", []),
    ],
)
def test_an_unreadable_text_is_refused(fit_refused, checkpoint, tmp_path, key, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    value = f"[{file}]" if key == "evaluation.perplexity" else file
    fit_refused(checkpoint, [f"--{key}={value}"], key, str(file), *words)


@pytest.mark.parametrize("argument", ["--data.calibration=wikitext2", "--evaluation.perplexity=[c4_new]"])
def test_a_named_set_that_cannot_be_fetched_is_refused(fit_refused, checkpoint, monkeypatch, argument):
    def unreachable(*arguments, **settings):
        raise ConnectionError("Couldn't reach the Hub\nafter five\ntries")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    key, source = argument.strip("-").split("=")
    fit_refused(checkpoint, [argument], key, source.strip("[]"), "Couldn't reach the Hub", "local file")


def test_a_system_prompt_without_a_chat_template_is_refused(fit_refused, checkpoint):
    fit_refused(checkpoint, ["--prompt.kind=system"], "prompt.kind", "chat template")


def test_a_chat_template_that_knows_no_system_message_is_refused(fit_refused, altered):
    """As Mistral-7B-Instruct-v0.1 has it."""
    settings = json.loads((altered / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}"
    )
    (altered / "tokenizer_config.json").write_text(json.dumps(settings))
    fit_refused(altered, ["--prompt.kind=system", "--prompt.text=Be brief."], "prompt")


# --- what does not fit together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([GPTQ, "--data.num_samples=2"], ["solver", "GPTQ", "96", "data.num_samples"]),
        ([ATOM, "--transform.outliers=8", "--data.num_samples=2"], ["transform", "Atom", "96", "data.num_samples"]),
        ([ATOM], ["128 outliers", "64"]),
        ([ATOM, "--transform.outliers=0"], ["transform.outliers"]),
        ([ATOM, "--transform.outliers=-4"], ["transform.outliers"]),
        ([ATOM, "--transform.outliers=8", "--transform.outlier_bits=1"], ["transform.outlier_bits"]),
        ([ATOM, "--transform.outliers=8", "--precision.weights.group_size=16"], ["precision.weights", "16", "56"]),
        ([GPTQ, "--solver.damp=-1"], ["solver.damp"]),
        ([GPTQ, "--solver.blocksize=0"], ["solver.blocksize"]),
        (["--trainer.accelerator=foo"], ["trainer.accelerator", "foo"]),
    ],
)
def test_what_does_not_fit_the_model_or_the_text_is_refused(fit_refused, checkpoint, arguments, words):
    fit_refused(checkpoint, arguments, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_a_gpu_that_is_not_there_is_refused(fit_refused, refused, checkpoint, accelerator):
    fit_refused(checkpoint, [f"--trainer.accelerator={accelerator}"], "trainer.accelerator", accelerator, "cpu")
    refused(["test", f"--checkpoint={checkpoint}", f"--accelerator={accelerator}"], " accelerator:", accelerator)


# --- the run directory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "sub", "sub/sub"])
def test_a_run_dir_that_is_a_file_stays_one(refused, fit_arguments, checkpoint, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(fit_arguments(checkpoint, file / below), "run_dir", str(file))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("below", [".", "sub/sub"])
def test_a_run_dir_that_cannot_be_written_is_refused(refused, fit_arguments, checkpoint, tmp_path, monkeypatch, below):
    run = tmp_path / below
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # as it is for others than root
    before = traces(tmp_path)
    refused(fit_arguments(checkpoint, run), f"run_dir: {run} can't be written", str(tmp_path))
    assert traces(tmp_path) == before


def test_a_run_dir_that_cannot_be_made_after_all_is_refused(refused, fit_arguments, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", fail)
    refused(
        fit_arguments(checkpoint, tmp_path / "run"), f"run_dir: {tmp_path / 'run'} can't be made: Permission denied"
    )


def test_a_foreign_directory_stays_as_it_is(refused, fit_arguments, checkpoint, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "model").mkdir(parents=True)
    (foreign / "model" / "thesis.txt").write_text("mine")
    before = traces(foreign)
    refused(fit_arguments(checkpoint, foreign), "run_dir", str(foreign))
    assert traces(foreign) == before


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--data.num_samples=4", ["data.num_samples: 8 → 4"]),
        ("--precision.weights.bits=3", ["precision.weights.bits: 4 → 3"]),
        ("--seed=1", ["seed: 0 → 1"]),
        ("--prompt.kind=none", ["prompt.kind: bos → none"]),
        ("--solver=bisup_lightning.calibrate.solvers.BiSup", ["solver.class_path", "RTN → ", "BiSup"]),
    ],
)
def test_a_run_of_another_configuration_names_old_and_new(refused, finished, argument, words):
    run, command = finished
    before = traces(run)
    refused([*command, argument], "run_dir", str(run), *words)
    assert traces(run) == before


def test_a_dry_run_refuses_what_a_run_would(refused, finished, fit_arguments, checkpoint, tmp_path):
    run, command = finished
    refused([*command, "--dry_run", "--seed=1"], "run_dir", str(run), "seed: 0 → 1")
    short = tmp_path / "short.txt"
    short.write_text("the " * 10)
    for key, value in (("data.calibration", str(short)), ("evaluation.perplexity", f"[{short}]")):
        words = fit_arguments(checkpoint, tmp_path / "never", f"--{key}={value}", "--dry_run")
        refused(words, key, str(short), "tokens")
    assert not (tmp_path / "never").exists()


def test_a_damaged_manifest_is_refused(refused, finished, tmp_path):
    run, command = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "manifest.json").write_text('{"blocks": ')
    refused([*command, f"--run_dir={copy}"], "run_dir", "manifest.json")


@pytest.fixture(scope="module")
def unfinished(make_checkpoint, text_file, tmp_path_factory, finished):
    run = tmp_path_factory.mktemp("runs") / "unfinished"
    Interrupt.at = ("on_block_start", 1)
    try:
        with pytest.raises(Interrupted):
            main(["--trust_classes_from=tests", *finished[1], f"--run_dir={run}", with_callback(Interrupt)])
    finally:
        Interrupt.at = None
    assert (run / "manifest.json").is_file()
    return run


@pytest.mark.parametrize(
    "command",
    [
        "test --run_dir={}",
        "predict --run_dir={} --text=Hello",
        "compare {}",
        "analyze --run_dir={}",
        "report --run_dir={}",
    ],
)
def test_an_unfinished_run_cannot_be_used(refused, unfinished, tmp_path, command):
    before = traces(unfinished)
    for run in (unfinished, tmp_path / "none"):
        words = [word.format(run) for word in command.split(" ")]
        refused(words, str(run), "fit")
    assert traces(unfinished) == before
    assert not (tmp_path / "none").exists()


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["run", "checkpoint"])
def measured(request, finished, checkpoint):
    """Arguments of a `test` of a run, and of a checkpoint."""
    run, _ = finished
    return ["test", "--accelerator=cpu", f"--run_dir={run}" if request.param == "run" else f"--checkpoint={checkpoint}"]


def test_an_unknown_task_to_measure_names_the_known(refused, measured):
    refused([*measured, "--evaluation.zero_shot=[mmlu]"], "evaluation.zero_shot", "mmlu", "arc_easy, boolq", ".jsonl")


def test_a_text_to_measure_on_that_is_shorter_than_one_chunk_is_refused(refused, measured, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("the " * 10)
    given = [f"--evaluation.perplexity=[{file}]", "--evaluation.seq_len=32"]
    refused([*measured, *given], "evaluation.perplexity", str(file), "12 tokens", "evaluation.seq_len = 32")


def test_a_checkpoint_to_measure_without_a_tokenizer_is_refused(refused, altered, text_file):
    for file in altered.glob("tokenizer*"):
        file.unlink()
    refused(["test", f"--checkpoint={altered}", f"--evaluation.perplexity=[{text_file}]"], str(altered), "tokenizer")


@pytest.mark.parametrize("command", ["test --run_dir={}", "predict --run_dir={} --text=Hello", "analyze --run_dir={}"])
def test_a_run_whose_model_has_lost_its_tokenizer_is_refused(refused, finished, tmp_path, command):
    run = shutil.copytree(finished[0], tmp_path / "run")
    for file in (run / "model").glob("tokenizer*"):
        file.unlink()
    refused([word.format(run) for word in command.split(" ")], str(run), "tokenizer")


def test_compare_names_an_output_that_is_no_folder(refused, finished, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(["compare", str(finished[0]), f"--output={file}"], "output", str(file), "no folder")
    assert file.read_text() == "mine"


def test_compare_names_the_run_that_is_not_finished(refused, finished, unfinished):
    refused(["compare", str(finished[0]), str(unfinished)], str(unfinished))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["fit", "test", "predict", "compare"]),
        (["quantize"], ["quantize", "fit"]),
        (["fit"], ["checkpoint", "run_dir"]),
        (["fit", "--checkpoint=model"], ["run_dir"]),
        (["test"], ["--run_dir", "--checkpoint"]),
        (["test", "--run_dir=a", "--checkpoint=b"], ["--run_dir", "--checkpoint"]),
        (["test", "--checkpoint=/no/such"], ["checkpoint", "/no/such"]),
        (["test", "--checkpoint=/no/such", "--evaluation.max_chunks=-1"], ["evaluation.max_chunks"]),
        (["test", "--checkpoint=/no/such", "--prompt.kind=text"], ["prompt.text"]),
        (["predict", "--run_dir=a"], ["text"]),
        (["compare"], ["runs"]),
    ],
)
def test_an_incomplete_command_says_what_is_missing(refused, arguments, words):
    refused(arguments, *words)


def test_measuring_nothing_is_refused(refused, checkpoint):
    """An empty table would look like a result."""
    refused(["test", f"--checkpoint={checkpoint}", "--accelerator=cpu"], "evaluation.perplexity")


@pytest.mark.parametrize("argument", ["--max_new_tokens=0", "--max_new_tokens=-5", "--temperature=-1"])
def test_impossible_generation_is_refused(refused, finished, argument):
    key = argument.split("=")[0].strip("-")
    refused(["predict", f"--run_dir={finished[0]}", "--text=Hello", "--accelerator=cpu", argument], key)


# --- help -------------------------------------------------------------------------------------------------------------


def shown(arguments, capsys):
    """What a command prints that ends by itself, in one way or the other."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert not code
    assert captured.err == ""
    return captured.out


def test_help_names_the_commands(capsys):
    text = shown(["--help"], capsys)
    for command in ("fit", "test", "predict", "compare"):
        assert f"\n    {command} " in text


def test_help_of_main_is_that_of_the_parser(capsys):
    """It is written out in main.py, which prints it without loading PyTorch."""
    lines = build_parser()._subcommands_action._choices_actions
    for command in lines:
        assert f"\n  {command.dest:9} {command.help}\n" in HELP
    assert HELP.count("\n  ") == len(lines) + 2  # and the two options
    assert f"{TRUST} MODULE " in HELP
    blind = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('main.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blind, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, HELP)


def test_help_of_fit_documents_every_key_of_base(capsys):
    """Keys of the chosen classes are in their own help."""
    text = shown(["fit", "--help"], capsys)
    base = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())
    keys = ["checkpoint", "run_dir", "seed", "solver", "transform", "trainer.callbacks"]
    keys += [f"{part}.{key}" for part in ("data", "prompt", "evaluation") for key in base[part]]
    keys += ["precision.weights", "precision.activations", "precision.kv"]
    for key in keys:
        assert f"--{key} " in text
    assert "Number of sequences" in text  # docstrings are the documentation


@pytest.mark.parametrize("name", ["solvers.BiSup", "solvers.GPTQ", "solvers.RTN"])
def test_help_of_a_solver_names_its_keys(capsys, name):
    assert "activation_clip" in shown(["fit", f"--solver.help=bisup_lightning.calibrate.{name}"], capsys)


def test_print_config_is_complete_and_reads_back(capsys, fit_arguments, checkpoint, tmp_path):
    arguments = fit_arguments(checkpoint, tmp_path / "run", "--solver.epochs=3")
    printed = shown([*arguments, "--print_config"], capsys)
    config = yaml.safe_load(printed)
    assert config["solver"]["init_args"]["epochs"] == 3
    assert config["data"] | {"calibration": None} == {
        "calibration": None, "num_samples": 8, "seq_len": 32, "batch_size": 4,
    }  # fmt: skip
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert shown(["fit", f"--config={file}", "--print_config"], capsys) == printed
    assert not (tmp_path / "run").exists()


# --- as a process -----------------------------------------------------------------------------------------------------


def start(*arguments):
    return subprocess.run(
        [sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_process_refuses_what_shows_only_later(checkpoint, fit_arguments, tmp_path):
    """Behind all imports and after the model was opened, and still no library says a word."""
    result = start(*fit_arguments(checkpoint, tmp_path / "run", "--data.seq_len=9000"))
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "seq_len" in result.stderr
    assert not (tmp_path / "run").exists()


# --- what is printed --------------------------------------------------------------------------------------------------


def test_compare_prints_the_numbers_of_both(capsys, finished, fit_arguments, tmp_path):
    run, command = finished
    other = tmp_path / "other"
    assert main([*command, f"--run_dir={other}", "--precision.weights.bits=3"]) == 0
    capsys.readouterr()
    text = shown(["compare", str(run), str(other)], capsys)
    for folder, name in ((run, "W4A4KV4"), (other, "W3A4KV4")):
        (figures,) = json.loads((folder / "results.json").read_text())["perplexity"].values()
        assert name in text
        assert f"{figures['quantized']:.4f}" in text


def test_predict_completes_a_text(capsys, finished):
    arguments = ["predict", f"--run_dir={finished[0]}", "--text=The name of", "--accelerator=cpu"]
    short = shown([*arguments, "--max_new_tokens=2"], capsys).strip()
    longer = shown([*arguments, "--max_new_tokens=8"], capsys).strip()
    assert short.startswith("The name of")
    assert longer.startswith(short)  # greedy: the same beginning
    assert len(longer) > len(short) > len("The name of")


def test_a_finished_fit_names_the_model_it_wrote(capsys, finished):
    run, command = finished
    before = contents(run)
    assert str(run / "model") in shown(command, capsys).replace("\n", "")
    assert contents(run) == before
