"""The walk over the blocks, judged from outside: by what transformers computes with the artifact it leaves."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bisup_lightning.calibrate import candidate as candidate_module
from bisup_lightning.calibrate.candidate import Candidate, clearly_better
from bisup_lightning.calibrate.solvers import Solution
from bisup_lightning.cli import main
from bisup_lightning.data.corpus import CalibrationData, calibration_tokens
from bisup_lightning.data.layer_inputs import LayerInputs
from bisup_lightning.model.checkpoint import SINGLE
from bisup_lightning.quant.affine import fake_quantize
from bisup_lightning.quant.gptq import ClippedSegment, accumulate_hessian, gptq_quantize
from bisup_lightning.quant.spec import QuantSpec
from tests.tools import BISUP, GPTQ, RTN, Poison, Watch, contents, with_callback

BATCH = 4
ATOM = ("--transform=bisup_lightning.transform.reorder.Atom", "--transform.outliers=8")
QUAROT = ("--transform=bisup_lightning.transform.rotate.QuaRot",)
W3A3 = ("--precision.weights.bits=3", "--precision.activations.bits=3")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(num_hidden_layers=3)


@pytest.fixture
def watched_fit(fit, tmp_path):
    """A `fit` whose streams and results lie in `Watch`; returns the run directory."""

    def run(checkpoint, *more, name="run"):
        Watch.fresh()
        return fit(checkpoint, tmp_path / name, *more, with_callback(Watch))

    return run


def block_metrics(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["blocks"]


def calibration_ids(checkpoint, text_file, seed=0):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return calibration_tokens(CalibrationData(str(text_file), 8, 32, BATCH), tokenizer, seed)


@torch.no_grad()
def outputs_of_blocks(folder, ids_NT):
    """Hidden states behind every block, as transformers computes them from a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs = [[] for _ in model.model.layers]
    for layer, seen in zip(model.model.layers, outputs, strict=True):
        layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
    for batch in ids_NT.split(BATCH):
        model(batch)
    return [torch.cat(seen) for seen in outputs]


# --- the streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["none", "bos"])
def test_x_fp_is_what_the_full_precision_model_computes(checkpoint, text_file, watched_fit, prompt):
    watched_fit(checkpoint, RTN, f"--prompt.kind={prompt}")
    ids_NT = calibration_ids(checkpoint, text_file)
    embedding = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings()
    for stream in Watch.streams[0]:
        assert torch.equal(stream, embedding(ids_NT))
    in_front = 1 if prompt == "bos" else 0
    behind = torch.cat([torch.zeros(8, in_front, dtype=torch.int64), ids_NT], 1)  # the BOS token is 0
    expected = outputs_of_blocks(checkpoint, behind)
    for (x_fp, _), whole in zip(Watch.streams[1:], expected, strict=True):
        torch.testing.assert_close(x_fp, whole[:, in_front:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        (RTN, "--prompt.kind=none"),
        (RTN, "--prompt.kind=text", "--prompt.text=Once upon a time"),
        (BISUP, "--solver.epochs=1"),
        (GPTQ, *ATOM),
        (BISUP, "--solver.epochs=1", *QUAROT),
    ],
    ids=["rtn-no-prompt", "rtn-text-prompt", "bisup", "gptq-atom", "bisup-quarot"],
)
def test_x_q_is_what_the_saved_model_computes(checkpoint, text_file, watched_fit, settings):
    """Every next block was calibrated on exactly what the fused, stored blocks before it give."""
    run = watched_fit(checkpoint, *settings)
    expected = outputs_of_blocks(run / "model", calibration_ids(checkpoint, text_file))
    assert len(Watch.streams) == 4
    for index, ((x_fp, x_q), whole) in enumerate(zip(Watch.streams[1:], expected, strict=True)):
        assert torch.equal(x_q, whole), index
        assert not torch.equal(x_q, x_fp)


@pytest.mark.parametrize("solver", [RTN, GPTQ, BISUP])
def test_the_losses_told_are_those_of_the_streams(checkpoint, watched_fit, solver):
    run = watched_fit(checkpoint, solver)
    metrics = block_metrics(run)
    assert [entry["index"] for entry in metrics] == [0, 1, 2]
    for entry, (x_fp, x_q) in zip(metrics, Watch.streams[1:], strict=True):
        loss = (x_q.double() - x_fp.double()).square().mean().item()
        assert entry["loss_final"] == entry["mse"] == pytest.approx(loss, rel=1e-5)
        assert entry["relative_mse"] == pytest.approx(loss / x_fp.double().square().mean().item(), rel=1e-5)
        assert entry["seconds"] > 0


def test_errors_propagate_into_the_next_blocks_inputs(checkpoint, watched_fit):
    """Both streams begin alike and part at the first quantized block."""
    watched_fit(checkpoint, RTN)
    distances = [(x_fp - x_q).norm().item() for x_fp, x_q in Watch.streams]
    assert distances[0] == 0
    assert all(distances[1:])


# --- what is won ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), W3A3, QUAROT, ATOM], ids=["w4a4", "w3a3", "quarot", "atom"])
def test_bisup_ends_below_its_start_in_every_block(checkpoint, watched_fit, settings):
    run = watched_fit(checkpoint, BISUP, *settings)
    for entry in block_metrics(run):
        assert entry["loss_final"] < entry["loss_initial"]
        assert entry["kept_start"] is False


def test_the_first_blocks_start_is_rounding(checkpoint, watched_fit):
    """Only there do solvers share their inputs."""
    rounded, learned = (block_metrics(watched_fit(checkpoint, s, name=s[-3:]))[0] for s in (RTN, BISUP))
    assert rounded["loss_final"] == rounded["loss_initial"] == learned["loss_initial"]
    assert learned["loss_final"] < 0.95 * rounded["loss_final"]


@pytest.mark.parametrize(
    ("on_sample", "behind", "expected"),
    [
        (0.9, 0.9, True),
        (0.9, 0.95, True),
        (0.98, 0.9, False),  # not clearly
        (0.9, 1.5, False),  # the sample does not speak for the rest
        (0.9, 0.1, False),
        (0.9, math.nan, False),
        (math.nan, 0.9, False),
    ],
)
def test_a_sample_leaves_no_doubt_where_it_is_like_the_rest(monkeypatch, on_sample, behind, expected):
    """Losses of a trained block on 16 of 32 sequences, and on the others, over those of its start."""
    x_NTD = torch.ones(32, 4, 8)
    monkeypatch.setattr(candidate_module, "SAMPLE", 16 * 4)
    inputs = LayerInputs(torch.zeros_like(x_NTD), x_NTD, torch.device("cpu"), 8)
    outputs_NTD = x_NTD * torch.tensor([on_sample, behind]).sqrt().repeat_interleave(16).view(-1, 1, 1)
    candidate = Candidate(Solution(torch.nn.Identity()), outputs_NTD, inputs.loss_of(outputs_NTD))
    assert clearly_better(candidate, lambda x_BTD: x_BTD, inputs) is expected


def test_gptq_beats_rounding_where_only_weights_are_quantized(checkpoint, watched_fit):
    weights_alone = ("--precision.weights.bits=3", "--precision.activations=null", "--precision.kv=null")
    rounded, solved = (block_metrics(watched_fit(checkpoint, s, *weights_alone, name=s[-3:])) for s in (RTN, GPTQ))
    for entry in solved:
        assert entry["loss_final"] <= entry["loss_initial"]
    assert solved[0]["loss_initial"] == rounded[0]["loss_final"]
    assert solved[0]["loss_final"] < 0.9 * rounded[0]["loss_final"]
    assert not solved[0]["kept_start"]
    assert solved[-1]["loss_final"] < 0.9 * rounded[-1]["loss_final"]


def test_gptq_solves_the_first_linears_for_the_inputs_they_will_have(checkpoint, text_file, watched_fit):
    """Step by step: embed, norm, quantize as the artifact does, Hessian, solve; q, k and v come out the same."""
    run = watched_fit(checkpoint, GPTQ, "--prompt.kind=none", "--precision.weights.bits=3")
    assert not block_metrics(run)[0]["kept_start"]
    fp, quantized = (AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, run / "model"))
    first = fp.model.layers[0]
    with torch.no_grad():
        x_TI = first.input_layernorm(fp.model.embed_tokens(calibration_ids(checkpoint, text_file))).flatten(0, 1)
        x_TI = fake_quantize(x_TI, QuantSpec(4), torch.tensor(0.9))
    hessian_II = accumulate_hessian(torch.zeros(64, 64), x_TI)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = first.self_attn.get_submodule(name).weight
        (solved,) = gptq_quantize(weight.detach(), hessian_II.clone(), [ClippedSegment(64, QuantSpec(3))])
        found = quantized.model.layers[0].self_attn.get_submodule(name).dense_weight()
        same = (found - solved.dequantize()).abs() < 1e-6
        assert same.double().mean() > 0.99  # sums in another order may tip a rounding
        assert not torch.allclose(found, weight, atol=1e-4)


# --- guards -----------------------------------------------------------------------------------------------------------

ABSURD = '--solver.optimization={"clip_lr": 3.0, "smoothing_lr": 30.0, "low_rank_lr": 100.0, "schedule": "constant"}'


def test_a_block_that_gets_worse_keeps_its_start_and_says_so(checkpoint, watched_fit, capsys):
    rounded = watched_fit(checkpoint, RTN, name="rtn")
    assert "kept its start" not in capsys.readouterr().out  # rounding has nothing to keep
    run = watched_fit(checkpoint, BISUP, ABSURD)
    output = capsys.readouterr().out
    assert output.count("kept its start") == 3
    for entry in block_metrics(run):
        assert entry["kept_start"] is True
        assert entry["loss_final"] == entry["loss_initial"]
    models = [contents(folder / "model") for folder in (run, rounded)]
    cards = [model.pop("README.md") for model in models]  # which name the solver
    assert models[0] == models[1]
    assert cards[0] != cards[1]
    assert [a["loss_final"] for a in block_metrics(run)] == [b["loss_final"] for b in block_metrics(rounded)]


@pytest.fixture
def poison():
    def give(doses):
        Poison.doses = doses
        return with_callback(Poison)

    yield give
    Poison.doses = 0


def block_files(run):
    return [path.read_bytes() for path in sorted(run.glob("blocks/*/block.safetensors"))]


def assert_finite(folder):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert not tensor.is_floating_point() or tensor.isfinite().all(), name


def test_nan_is_tried_again_at_a_tenth_of_the_rate(checkpoint, watched_fit, poison):
    run = watched_fit(checkpoint, BISUP, "--solver.epochs=2", poison(1))
    assert Poison.doses == 0
    first, second, *rest = Watch.rates
    assert len(rest) == 2  # the other two blocks
    assert second == pytest.approx({name: rate / 10 for name, rate in first.items()})
    assert all(rates == first for rates in rest)
    for name, start in Watch.learned[0].items():
        assert torch.equal(start, Watch.learned[1][name]), name  # from the same start
    assert not block_metrics(run)[0]["kept_start"]
    assert_finite(run / "model")


@pytest.mark.parametrize("doses", [0, 1])
def test_first_epochs_on_full_precision_inputs_are_the_same_in_the_first_block_alone(
    checkpoint, watched_fit, poison, doses
):
    """Where both inputs are the embedded text; a second attempt begins on them anew."""
    plain, early = (
        block_files(
            watched_fit(
                checkpoint, BISUP, "--solver.epochs=3", f"--solver.fp_epochs={count}", poison(doses), name=str(count)
            )
        )
        for count in (0, 2)
    )
    assert [one == other for one, other in zip(plain, early, strict=True)] == [True, False, False]


def test_nan_twice_keeps_the_start_and_the_walk_goes_on(checkpoint, watched_fit, poison, capsys):
    rounded = watched_fit(checkpoint, RTN, name="rtn")
    run = watched_fit(checkpoint, BISUP, "--solver.epochs=2", poison(2))
    assert Poison.doses == 0
    assert len(Watch.rates) == 4
    kept = [entry["kept_start"] for entry in block_metrics(run)]
    assert kept == [True, False, False]
    assert capsys.readouterr().out.count("kept its start") == 1
    first = "model-00000.safetensors"
    assert contents(run / "model")[first] == contents(rounded / "model")[first]
    assert_finite(run / "model")


# --- switches of Θ ----------------------------------------------------------------------------------------------------

GENTLE = '--solver.optimization={"clip_lr": 0.005, "smoothing_lr": 0.005, "low_rank_lr": 0.001}'
SWITCHES = {
    "all": ({}, {"clip", "smoothing", "low_rank"}),
    "clip": ({"smoothing": "none", "low_rank": "none"}, {"clip"}),
    "smoothing": ({"clip": False, "low_rank": "none"}, {"smoothing"}),
    "low_rank": ({"clip": False, "smoothing": "none"}, {"low_rank"}),
    "no clip": ({"clip": False}, {"smoothing", "low_rank"}),
    "lrec": ({"low_rank": "lrec"}, {"clip", "smoothing", "low_rank"}),
    "hard": ({"smoothing": "hard"}, {"clip", "smoothing", "low_rank"}),
}


@pytest.mark.parametrize(("theta", "kinds"), SWITCHES.values(), ids=SWITCHES)
def test_only_what_is_switched_on_is_learned(checkpoint, watched_fit, theta, kinds):
    """Nothing else has a gradient or changes in the artifact; and each part alone is of some use."""
    run = watched_fit(checkpoint, BISUP, *W3A3, GENTLE, f"--solver.theta={json.dumps(theta)}")
    for learned in Watch.learned:
        found = {kind for kind in ("clip", "smoothing", "low_rank") for name in learned if kind in name}
        assert found == kinds
    trained = [result for result in Watch.results if not result.kept_start]
    assert trained
    assert all(entry["loss_final"] <= entry["loss_initial"] for entry in block_metrics(run))
    fp = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    for result in trained:
        norms = {name: value for name, value in result.tensors.items() if name.endswith("norm.weight")}
        assert len(norms) == 2
        for name, value in norms.items():
            same = torch.equal(value, fp[name.replace("layernorm.norm.weight", "layernorm.weight")])
            assert same is ("smoothing" not in kinds)
        clips = [value for name, value in result.tensors.items() if "clips" in name]
        assert len(clips) == 4  # one for each quantized input
        assert all((value == 0.9).all() for value in clips) is ("clip" not in kinds)


def test_soft_smoothing_has_a_vector_for_each_linear_and_hard_has_one_for_both_sides(checkpoint, watched_fit):
    counts = {}
    for form in ("soft", "hard"):
        watched_fit(checkpoint, BISUP, "--solver.epochs=1", f'--solver.theta={{"smoothing": "{form}"}}', name=form)
        counts[form] = sum("smoothing" in name for name in Watch.learned[0])
    assert counts == {"soft": 2 + 5, "hard": 2}


def test_rank_is_the_inner_size(checkpoint, watched_fit):
    watched_fit(checkpoint, BISUP, "--solver.epochs=1", "--solver.theta.rank=5")
    shapes = {name: value.shape for name, value in Watch.learned[0].items() if "low_rank" in name}
    assert len(shapes) == 14
    for name, shape in shapes.items():
        assert shape[1 if name.endswith("_a") else 0] == 5


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(BISUP, "--solver.epochs=2"), (GPTQ, *ATOM)], ids=["bisup", "gptq-atom"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(checkpoint, watched_fit, settings):
    torch.manual_seed(1)
    first = contents(watched_fit(checkpoint, *settings, name="first") / "model")
    torch.manual_seed(2)
    again = contents(watched_fit(checkpoint, *settings, name="again") / "model")
    other = contents(watched_fit(checkpoint, *settings, "--seed=1", name="other") / "model")
    assert again == first
    blocks = [name for name in first if name.startswith("model-0")]
    assert len(blocks) == 3
    assert all(other[name] != first[name] for name in blocks)


def test_the_seed_alone_changes_what_is_drawn_for_theta(checkpoint, watched_fit):
    starts = []
    for seed in (0, 0, 1):
        watched_fit(checkpoint, BISUP, "--solver.epochs=1", f"--seed={seed}", name=str(len(starts)))
        starts.append([learned["self_attn.q_proj.low_rank_a"] for learned in Watch.learned])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    assert not torch.equal(starts[0][0], starts[0][1])  # each block draws its own


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
@pytest.mark.parametrize("solver", [RTN, GPTQ, BISUP])
def test_a_block_whose_output_is_not_finite_is_named(checkpoint, fit_arguments, tmp_path, capsys, solver, part):
    spoiled = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    tensors = load_file(spoiled / SINGLE)
    tensors[f"model.layers.1.mlp.{part}.weight"][3] = torch.finfo(torch.float32).max  # whose sums overflow
    save_file(tensors, spoiled / SINGLE)
    assert main(fit_arguments(spoiled, tmp_path / "run", solver)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == "error: checkpoint: the full-precision output of block 1 is not finite"
    assert not (tmp_path / "run" / "model" / "config.json").exists()
