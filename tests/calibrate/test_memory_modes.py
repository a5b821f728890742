"""Less memory, the same result: sequences one by one, activations computed anew, streams in a file."""

import gc
import itertools
import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from bisup_lightning.calibrate.block_calibration import BlockCalibration, Optimization
from bisup_lightning.calibrate.driver import BlockWalk
from bisup_lightning.calibrate.events import WalkCallback
from bisup_lightning.cli import main
from bisup_lightning.data.streams import StreamStorage
from bisup_lightning.model.blockwise import BlockwiseModel, run_layer, run_layer_in_halves
from bisup_lightning.model.kv import BlockKV, KVQuantizer
from bisup_lightning.model.theta import Theta, add_theta, theta_parameters
from bisup_lightning.quant.spec import QuantSpec
from tests.calibrate.test_block_calibration import Problem
from tests.model.test_compiled import SCHEMES, quantized
from tests.model.tiny import (
    KINDS,
    family_of,
    full_precision_layer,
    positions_of,
    random_hidden,
    random_prompt,
    random_tensors,
)
from tests.tools import BISUP, EAGER, GPTQ, QUAROT, RTN, Interrupt, Interrupted, contents, timeless, with_callback

LOW, FILE = "--memory=low", "--streams=file"


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


# --- a block in halves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_the_layer(kind):
    family = family_of(kind)
    layer = full_precision_layer(family, random_tensors(family, 0))
    hidden, positions = random_hidden(0, 2, 6, family.hidden_size), positions_of(family, 6, 3, torch.float64)
    kv = BlockKV(KVQuantizer(QuantSpec(4, symmetric=False, granularity="head")), random_prompt(0, family, 3))
    expected = run_layer(layer, hidden, positions, kv)
    assert torch.equal(run_layer_in_halves(layer, hidden, positions, kv), expected)


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return BlockwiseModel(
        make_checkpoint("qwen3", num_hidden_layers=1, hidden_size=256, intermediate_size=768), torch.device("cpu")
    )


def most_bytes(function):
    """What a function returns, and the most memory that it has taken at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return result, max(itertools.accumulate(changes))


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_computed_anew_are_the_same_and_take_less_memory(model, name):
    scheme, found, sizes = SCHEMES[name], [], []
    prompt = model.encode_prompt(0, model.layer(0), model.embed(torch.arange(3)[None]))[1]
    positions, kv = model.positions(0, 12, 3), BlockKV(KVQuantizer.of(scheme), prompt)
    x_BTD = torch.randn(2, 12, model.family.hidden_size, generator=torch.Generator().manual_seed(1))
    for frugal in (False, True):
        layer = quantized(model, 0, scheme)
        add_theta(layer, Theta(smoothing_start="ones", rank=4), torch.Generator().manual_seed(0))
        module = BlockCalibration(layer, positions, kv, Optimization(), 1, frugal=frugal)

        def gradients(module=module):
            loss = module.loss(module.layer, x_BTD, 2 * x_BTD, positions, kv)
            return torch.autograd.grad(loss, list(theta_parameters(module.layer).values()))

        gradient, size = most_bytes(gradients)
        found.append(gradient)
        sizes.append(size)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert sizes[1] < 0.65 * sizes[0]


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_theta_is_that_of_the_default(make_checkpoint, micro_batch):
    problem = Problem(make_checkpoint(num_hidden_layers=1))
    whole, loss = problem.train(Optimization(), epochs=2)
    parts, loss_of_parts = problem.train(Optimization(), epochs=2, micro_batch=micro_batch, frugal=True)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_in_low_memory_gives_the_same_model(checkpoint, fit, tmp_path):
    runs = [
        fit(checkpoint, tmp_path / name, BISUP, "--solver.epochs=2", *more)
        for name, more in (("auto", ()), ("low", (LOW,)))
    ]
    one, two = (json.loads((run / "results.json").read_text())["blocks"] for run in runs)
    assert [block["micro_batch"] for block in one] == [4, 4]
    assert [block["micro_batch"] for block in two] == [1, 1]
    for default, low in zip(one, two, strict=True):
        assert low["loss_initial"] == pytest.approx(default["loss_initial"], rel=1e-3)
        assert low["loss_final"] == pytest.approx(default["loss_final"], rel=0.02)
    first, second = (load_file(run / "model" / "model-00000.safetensors") for run in runs)
    for key in first:
        if not first[key].is_floating_point():
            assert (first[key] != second[key]).float().mean() < 0.01, key  # a tie that another order of a sum decides


@pytest.mark.slow
def test_a_run_in_low_memory_resumes_to_the_byte(cut_off_and_resumed, checkpoint, fit_arguments, tmp_path):
    settings = (BISUP, "--solver.epochs=2", LOW, EAGER, with_callback(Interrupt))
    command = fit_arguments(checkpoint, tmp_path / "cut", *settings)
    assert main(fit_arguments(checkpoint, tmp_path / "whole", *settings)) == 0
    cut_off_and_resumed(command)
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")


@pytest.fixture
def files(monkeypatch):
    """How many tensors were made in files."""
    made, empty = [], StreamStorage.empty

    def watched(self, shape, dtype):
        made.extend([shape] * (self.place == "file"))
        return empty(self, shape, dtype)

    monkeypatch.setattr(StreamStorage, "empty", watched)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(BISUP, "--solver.epochs=2"), (GPTQ, QUAROT)], ids=["bisup", "gptq-quarot"])
def test_streams_in_a_file_give_the_same_bytes(files, checkpoint, fit, tmp_path, settings):
    host = fit(checkpoint, tmp_path / "host", *settings, "--streams=host")
    assert not files
    mapped = fit(checkpoint, tmp_path / "mapped", *settings, FILE)
    kept = sum(block["kept_start"] for block in timeless(mapped)["blocks"])
    assert len(files) == 4 + kept  # x_fp, x_q, and what becomes of x_q in two blocks, once more in those
    assert contents(mapped / "model") == contents(host / "model")
    assert timeless(mapped) == timeless(host)
    assert {p.name for p in mapped.iterdir()} == {p.name for p in host.iterdir()}


def test_a_run_goes_on_with_its_streams_elsewhere(monkeypatch, files, checkpoint, fit_arguments, tmp_path):
    settings = (RTN, EAGER, with_callback(Interrupt))
    assert main(fit_arguments(checkpoint, tmp_path / "whole", *settings)) == 0
    monkeypatch.setattr(Interrupt, "at", ("on_block_start", 1))
    with pytest.raises(Interrupted):
        main(fit_arguments(checkpoint, tmp_path / "cut", *settings))
    monkeypatch.setattr(Interrupt, "at", None)
    assert not files
    assert main(fit_arguments(checkpoint, tmp_path / "cut", *settings, FILE)) == 0
    assert len(files) == 3
    assert contents(tmp_path / "cut" / "model") == contents(tmp_path / "whole" / "model")


def test_another_memory_mode_is_another_run(checkpoint, fit, fit_arguments, tmp_path, capsys):
    """Its sums have another order."""
    fit(checkpoint, tmp_path / "run", RTN)
    assert main(fit_arguments(checkpoint, tmp_path / "run", RTN, LOW)) == 2
    assert "memory: auto → low" in capsys.readouterr().err


# --- from block to block ----------------------------------------------------------------------------------------------


class LiveBytes(WalkCallback):
    """The memory of all tensors where a block begins."""

    seen: ClassVar[list[int]] = []

    def on_block_start(self, walk: BlockWalk, index: int) -> None:
        tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.seen.append(sum(storages.values()))


@pytest.mark.parametrize("solver", [BISUP, GPTQ, RTN])
def test_finished_blocks_leave_no_tensors_to_the_garbage_collector(make_checkpoint, fit, tmp_path, solver):
    """Which comes seldom: until then, the device would fill up."""
    LiveBytes.seen.clear()
    gc.collect()
    gc.disable()
    try:
        checkpoint = make_checkpoint(num_hidden_layers=5)
        epochs = ("--solver.epochs=2",) if solver == BISUP else ()
        fit(checkpoint, tmp_path / "run", solver, *epochs, with_callback(LiveBytes))
    finally:
        gc.enable()
    block = sum(x.nbytes for name, x in load_file(checkpoint / "model.safetensors").items() if "layers.0." in name)
    _, second, *_, last = LiveBytes.seen
    assert last - second < 0.05 * block
