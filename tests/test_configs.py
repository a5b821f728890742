"""Every configuration that ships is understood by the real parser, and they compose as the documentation says."""

import pytest
import yaml

from bisup_lightning.calibrate.solvers import GPTQ, RTN, BiSup
from bisup_lightning.parsers import build_parser, fit_parser
from bisup_lightning.transform.reorder import Atom
from bisup_lightning.transform.rotate import QuaRot
from bisup_lightning.transform.transform import NoTransform
from tests.inputs import ROOT

CONFIGS = ROOT / "configs"
BASE, DEMO = CONFIGS / "base.yaml", CONFIGS / "demo.yaml"
PARTS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in (BASE, DEMO))
CLASSES = {
    "none": NoTransform, "atom": Atom, "quik": Atom, "quarot": QuaRot, "bisup": BiSup, "gptq": GPTQ, "rtn": RTN,
}  # fmt: skip


def resolve(*configs, arguments=("--checkpoint=folder", "--run_dir=run")):
    """The parsed `fit` of these configurations in this order; a string is an argument that stands between them."""
    words = [f"--config={item}" if not str(item).startswith("--") else item for item in configs]
    return build_parser().parse_args(["fit", *words, *arguments]).fit


def build(config):
    """What the configuration describes; nothing is read and no Trainer is made yet."""
    return fit_parser().instantiate_classes(config)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_each_part_says_what_it_sets_when_composed_on_base(path):
    """All that the file names is in the resolved configuration, and the classes accept it."""
    config = resolve(BASE, path, arguments=("--run_dir=run", "--checkpoint=folder"))
    config.pop("config")

    def assert_contains(resolved, written, key):
        if isinstance(written, dict):
            for name, value in written.items():
                assert_contains(resolved[name], value, f"{key}.{name}")
        else:
            assert resolved == written, key

    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written.pop("checkpoint", "given above") != "folder"
    assert_contains(config.as_dict(), written, path.stem)
    objects = build(config)
    if path.parent.name in ("transform", "solver"):
        assert type(getattr(objects, path.parent.name)) is CLASSES[path.stem]


def test_demo_alone_is_complete():
    config = resolve(DEMO, arguments=())
    objects = build(config)
    assert (ROOT / config.checkpoint / "model.safetensors").is_file()
    assert isinstance(objects.solver, BiSup)
    assert objects.data.calibration == "self"
    assert tuple(objects.evaluation.perplexity) == ("self",)


def test_base_names_everything_but_the_checkpoint_and_the_place():
    """With another base, nothing of a run would hang on defaults in the code; §5.1's numbers are in it."""
    objects = build(resolve(BASE))
    precision, data = objects.precision, objects.data
    assert (precision.weights.bits, precision.activations.bits, precision.kv.bits) == (4, 4, 4)
    assert (precision.kv.symmetric, precision.kv.granularity) == (False, "head")
    assert (data.num_samples, data.seq_len, data.batch_size) == (128, 2048, 8)
    assert [type(callback).__name__ for callback in objects.trainer.callbacks] == [
        "BF16", "Fuse", "BlockCheckpoint", "WalkProgress", "Telemetry", "ThetaStatistics", "BlockLog",
    ]  # fmt: skip


def test_the_documented_command_composes():
    """Configurations are composed: a precision, a transform and a solver behind the base."""
    objects = build(
        resolve(
            BASE, CONFIGS / "precision" / "w3a3-g128.yaml", CONFIGS / "transform" / "quarot.yaml",
            CONFIGS / "solver" / "bisup.yaml", "--data.calibration=wikitext2", "--data.num_samples=16",
            "--data.seq_len=512", "--data.batch_size=4", "--evaluation.perplexity=[wikitext2, c4]",
        )
    )  # fmt: skip
    assert (objects.precision.weights.bits, objects.precision.weights.group_size) == (3, 128)
    assert isinstance(objects.transform, QuaRot)
    assert (objects.data.num_samples, objects.data.seq_len, objects.data.batch_size) == (16, 512, 4)
    assert list(objects.evaluation.perplexity) == ["wikitext2", "c4"]


def test_the_last_one_wins_and_leaves_the_rest(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\ndata: {num_samples: 3, seq_len: 64}\n")
    second.write_text("seed: 2\ndata: {num_samples: 5}\n")
    ahead, behind = resolve(BASE, first, second), resolve(BASE, second, first)
    assert (ahead.seed, ahead.data.num_samples, ahead.data.seq_len, ahead.data.batch_size) == (2, 5, 64, 8)
    assert (behind.seed, behind.data.num_samples, behind.data.seq_len, behind.data.batch_size) == (1, 3, 64, 8)


def test_an_argument_wins_over_what_stands_before_it_alone(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("seed: 7\n")
    assert resolve(BASE, file, "--seed=9").seed == 9
    assert resolve(BASE, "--seed=9", file).seed == 7


def test_a_precision_behind_the_papers_setting_keeps_how_clips_are_shared():
    paper, precision = CONFIGS / "paper" / "optimization.yaml", CONFIGS / "precision" / "w3a3-g128.yaml"
    weights = resolve(BASE, paper, precision).precision.weights
    assert (weights.bits, weights.group_size, weights.granularity) == (3, 128, "group")


def test_an_ablation_behind_the_papers_setting_keeps_its_optimization():
    paper = build(resolve(BASE, CONFIGS / "paper" / "optimization.yaml")).solver
    both = build(resolve(BASE, CONFIGS / "paper" / "optimization.yaml", CONFIGS / "ablation" / "fwac.yaml")).solver
    assert both.optimization == paper.optimization
    assert both.optimization.schedule == "constant"
    assert both.theta.smoothing_start == paper.theta.smoothing_start == "ones"
    assert (both.theta.clip, both.theta.smoothing, both.theta.low_rank) == (True, "none", "none")


def test_another_class_brings_its_own_arguments():
    quik, atom = CONFIGS / "transform" / "quik.yaml", CONFIGS / "transform" / "atom.yaml"
    assert build(resolve(BASE, quik)).transform.outlier_bits is None
    assert type(build(resolve(BASE, quik, CONFIGS / "transform" / "quarot.yaml")).transform) is QuaRot
    assert type(build(resolve(BASE, atom, CONFIGS / "transform" / "none.yaml")).transform) is NoTransform


def test_what_a_run_wrote_down_resolves_to_itself(make_checkpoint, fit, tmp_path):
    """run_dir/config.yaml is a complete configuration: read alone, it gives the same one again."""
    run = fit(make_checkpoint(), tmp_path / "run", f"--config={CONFIGS / 'solver' / 'rtn.yaml'}")
    again = resolve(run / "config.yaml", arguments=())
    assert fit_parser().dump(again, skip_none=False) == (run / "config.yaml").read_text(encoding="utf-8")
