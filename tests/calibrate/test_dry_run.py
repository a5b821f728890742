"""What a run would take: the arithmetic is a real run's, what can't fit is refused at once, nothing is written."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from bisup_lightning import cli
from bisup_lightning.calibrate import budget, dry_run
from bisup_lightning.calibrate.budget import Budget, check_room
from bisup_lightning.calibrate.dry_run import Forecast
from bisup_lightning.calibrate.measure import open_checkpoint
from bisup_lightning.calibrate.parallel import Ranks
from bisup_lightning.calibrate.signals import Signals
from bisup_lightning.cli import main
from bisup_lightning.data import streams
from bisup_lightning.job_config import make_job
from bisup_lightning.parsers import fit_parser
from tests.tools import BISUP, EAGER, GPTQ, QUAROT, RTN, Interrupt, Interrupted, Watch, with_callback

ATOM = "--transform=bisup_lightning.transform.reorder.Atom"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture
def forecasts(monkeypatch):
    """What dry runs found."""
    found, real = [], cli.dry_run

    def kept(job):
        found.append(real(job))
        return found[-1]

    monkeypatch.setattr(cli, "dry_run", kept)
    return found


@pytest.mark.parametrize(
    "settings", [(RTN,), (GPTQ, QUAROT), (BISUP, ATOM, "--transform.outliers=16"), (BISUP, "--memory=low")]
)
def test_a_dry_run_measures_every_solver_and_writes_nothing(
    checkpoint, fit_arguments, tmp_path, capsys, forecasts, settings
):
    run = tmp_path / "run"
    assert main(fit_arguments(checkpoint, run, *settings, "--data.num_samples=96", "--dry_run")) == 0
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    for word in ("walk over 2 blocks", "a block", "solve", "host memory", "streams (host)", "disk of "):
        assert word in printed
    (forecast,) = forecasts
    assert forecast.seconds == 2 * sum(forecast.phases.values()) > 0
    assert forecast.device == 0
    assert forecast.host > 10**8


@pytest.mark.parametrize(("samples", "seconds"), [(3, 2.0), (8, 3.0), (16, 5.0), (10, 3.5)])
def test_seconds_grow_with_the_sequences(monkeypatch, checkpoint, fit_arguments, tmp_path, forecasts, samples, seconds):
    """Two seconds for one batch of four, one more for each other; what does not grow stays."""
    batches = []

    def calibrate(walk, tokens_NT):
        batches.append(tuple(tokens_NT.shape))
        return {"read": 7.0, "solve": 2.0 if len(tokens_NT) <= 4 else 3.0}

    monkeypatch.setattr(dry_run, "calibrate", calibrate)
    assert main(fit_arguments(checkpoint, tmp_path / "run", RTN, f"--data.num_samples={samples}", "--dry_run")) == 0
    assert batches == [(min(4, samples), 32)] * 2 + [(min(8, samples), 32)]
    assert forecasts[0].phases == {"read": 7.0, "solve": pytest.approx(seconds)}
    assert forecasts[0].seconds == pytest.approx(2 * (7 + seconds))


@pytest.mark.parametrize("settings", [(), (QUAROT,), ("--precision.weights.group_size=16",)])
def test_the_arithmetic_is_that_of_a_run(checkpoint, fit_arguments, fit, tmp_path, forecasts, settings):
    main(fit_arguments(checkpoint, tmp_path / "run", RTN, *settings, "--dry_run"))
    found = forecasts[0].budget
    Watch.fresh()
    run = fit(checkpoint, tmp_path / "run", RTN, *settings, with_callback(Watch))
    assert found.stream == Watch.streams[0][0].nbytes
    size = sum(path.stat().st_size for path in (run / "model").glob("*.safetensors"))
    assert 0.95 * size < found.disk <= size
    weights = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert found.block == 4 * weights


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def scarce(monkeypatch):
    """`scarce(disk=…, host=…)`: bytes that are free."""

    def set_free(disk=10**15, host=10**15):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**15, 0, disk))
        for module in (budget, streams):
            monkeypatch.setattr(module, "free_host_bytes", lambda: host)

    return set_free


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("free", "settings", "words"),
    [
        ({"disk": 10**6}, (), ("run_dir: ", "on the disk", "name a run_dir with more room")),
        ({"host": 10**5}, ("--streams=host",), ("data.num_samples: ", "host memory", "--streams file")),
        ({"host": 10**5}, (), ("data.seq_len: ", "host memory", "smaller data.seq_len")),
        ({"disk": 3 * 10**6}, ("--streams=file", "--data.num_samples=512"), ("run_dir: ", "data.num_samples")),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_at_once(
    scarce, checkpoint, fit_arguments, tmp_path, capsys, free, settings, words, more
):
    scarce(**free)
    assert main(fit_arguments(checkpoint, tmp_path / "run", RTN, *settings, *more)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


def test_what_just_fits_is_not_refused(scarce, checkpoint, fit_arguments, fit, tmp_path, forecasts):
    main(fit_arguments(checkpoint, tmp_path / "run", RTN, "--dry_run"))
    found = forecasts[0].budget
    scarce(disk=found.disk, host=found.host)
    fit(checkpoint, tmp_path / "run", RTN, "--streams=host")


def test_a_run_that_goes_on_is_not_asked(scarce, monkeypatch, checkpoint, fit_arguments, tmp_path):
    """Part of what it needs is there, and it ends in one line where a disk is full."""
    command = fit_arguments(checkpoint, tmp_path / "run", RTN, EAGER, with_callback(Interrupt))
    monkeypatch.setattr(Interrupt, "at", ("on_block_start", 1))
    with pytest.raises(Interrupted):
        main(command)
    monkeypatch.setattr(Interrupt, "at", None)
    scarce(disk=1)
    assert main(command) == 0


@pytest.mark.parametrize(
    ("place", "key", "remedy"),
    [("device", "streams: ", "--streams host"), ("host", "data.seq_len: ", "smaller data.seq_len")],
)
def test_a_gpu_that_is_too_small_is_refused(monkeypatch, tmp_path, place, key, remedy):
    monkeypatch.setattr(budget.torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    needs = Budget(place, stream=250, block=100, sequence=100, packed=1, shared=1, num_layers=1, on_gpu=True)
    check_room(replace(needs, stream=200), budget.torch.device("cuda"), tmp_path)
    assert needs.device == (1050 if place == "device" else 300)
    with pytest.raises(budget.UserError, match=f"{key}.*device memory.*{remedy}"):
        check_room(replace(needs, block=500), budget.torch.device("cuda"), tmp_path)


@pytest.mark.parametrize(
    ("mode", "world", "copies", "part"), [("none", 1, 3, 1), ("data", 4, 3, 4), ("wavefront", 4, 4, 2)]
)
def test_processes_of_a_host_share_its_room(
    monkeypatch, checkpoint, fit_arguments, tmp_path, forecasts, mode, world, copies, part
):
    """Each holds its part of the text: a wavefront of two stages with two members each, half of it."""
    main(fit_arguments(checkpoint, tmp_path / "run", RTN, "--dry_run"))
    alone = forecasts[0].budget
    stages = () if mode == "none" else (f"--parallel.mode={mode}",)
    parser = fit_parser()
    arguments = fit_arguments(checkpoint, tmp_path / "run", BISUP, "--solver.epochs=3", *stages)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    job = make_job(parser, parser.parse_args(arguments[arguments.index("fit") + 1 :]), Signals(), Ranks(world=world))
    plain = open_checkpoint(job.checkpoint, job.device)[0]
    found = Budget.of(job, plain, job.transform.scheme(job.precision))
    assert found.stream == alone.stream // part
    assert found.streams == copies * found.stream
    assert found.host == world * (found.streams + found.computing)


def test_sizes_and_times_are_for_people(checkpoint, tmp_path, forecasts, fit_arguments):
    main(fit_arguments(checkpoint, tmp_path / "run", RTN, "--dry_run"))
    one = replace(forecasts[0].budget, num_layers=32, stream=2**31)
    rows = {row[0].strip(): row[1] for row in Forecast(forecasts[0].job, one, {"solve": 120.0}, 0, 2**33).rows()}
    assert rows["walk over 32 blocks"] == "1:04:00"
    assert rows["host memory"] == "8.00 GiB"
    assert rows["streams (host)"] == "6.00 GiB"
