"""The chart of several runs' errors: whose lines it holds, at which numbers, and what is said where there is none."""

import re
from xml.etree import ElementTree

import pytest

from bisup_lightning.cli import main
from bisup_lightning.report.charts import SERIES
from bisup_lightning.report.errors_chart import errors, labels, series
from bisup_lightning.report.run import Run
from tests.report.runs import results_of, write_run
from tests.report.test_compare import NO_PROMPT, RTN

GPTQ = {"solver.class_path": "x.GPTQ"}
SVG = "{http://www.w3.org/2000/svg}"


def analysis_of(last, texts=("calibration", "wiki.txt")):
    """Errors of three blocks that end at `last`, and along four tokens, twice as large with a quantized prompt."""
    along = {"prompt_exact": [last] * 4, "prompt_quantized": [2 * last] * 4}
    figures = {"mse": [1, 2, 3], "relative_mse": [last / 4, last / 2, last], "by_position": along}
    return {"sets": dict.fromkeys(texts, figures)}


def run_of(folder, last, settings=None, analyzed=True, **changes):
    return Run.read(write_run(folder, results_of(settings, **changes), analysis_of(last) if analyzed else None))


@pytest.fixture
def runs(tmp_path):
    settings = {"rtn": RTN, "gptq": GPTQ, "bisup": {}}
    return [run_of(tmp_path / name, last, settings[name]) for name, last in (("rtn", 0.4), ("gptq", 0.2), ("bisup", 0.1))]  # fmt: skip  # noqa: E501


def strokes(svg, colour, dashed=False):
    """Paths drawn in a colour, as lists of points in the picture's units; the legends' keys have two points."""
    paths = [path for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if "clip-path" in path.attrib]
    return [
        [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))]
        for path in paths
        if f"stroke: {colour.lower()}" in path.get("style") and ("dasharray" in path.get("style")) == dashed
    ]


def text_of(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_run_has_a_line_for_each_text_and_two_along_it(runs):
    """Errors that are halved from run to run lie one step of a logarithmic axis below each other, in every panel."""
    svg = errors(runs)
    heights = []
    for colour, _ in SERIES[:3]:
        calibration, evaluation, along = sorted(strokes(svg, colour), key=lambda points: (points[-1][1], points[0][0]))
        assert [len(points) for points in (calibration, evaluation, along)] == [3, 3, 4]
        (quantized,) = strokes(svg, colour, dashed=True)
        assert [y for _, y in calibration] == [y for _, y in evaluation]  # panels share their axis
        assert calibration[0][1] - calibration[1][1] == pytest.approx(calibration[1][1] - calibration[2][1], abs=0.01)
        assert quantized[0][1] < along[0][1]  # the larger error stands higher
        heights.append((calibration[-1][1], along[-1][1], quantized[-1][1]))
    rtn, gptq, bisup = heights
    for panel in range(3):
        assert gptq[panel] - rtn[panel] == pytest.approx(bisup[panel] - gptq[panel], abs=0.01)
        assert rtn[panel] < gptq[panel] < bisup[panel]
    assert not strokes(svg, SERIES[3][0])


def test_no_line_leaves_its_panel(tmp_path):
    """Panels share an axis that reaches from the smallest error of any run and text to the largest."""
    analysis = analysis_of(0.1)
    analysis["sets"]["wiki.txt"] = analysis_of(2.0)["sets"]["wiki.txt"]
    svg = errors([Run.read(write_run(tmp_path / "run", analysis=analysis))])
    root = ElementTree.fromstring(svg)
    frames = {frame.get("id"): frame.find(f"{SVG}rect") for frame in root.iter(f"{SVG}clipPath")}
    lines = [path for path in root.iter(f"{SVG}path") if SERIES[0][0].lower() in path.get("style", "")]
    drawn = [path for path in lines if "clip-path" in path.attrib]
    assert len(drawn) == 4
    for path in drawn:
        frame = frames[path.get("clip-path")[5:-1]]
        top, height = float(frame.get("y")), float(frame.get("height"))
        for _, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d")):
            assert top < float(y) < top + height


def test_axes_texts_and_methods_have_their_names(runs):
    words = text_of(errors(runs))
    for name in (
        "calibration text", "wiki.txt", "block", "distance from the first token of the text (tokens)",
        "relative mean square error", "(log scale)", "along wiki.txt, behind the last block",
        "Atom (RTN) + prompt W4A4", "Atom (GPTQ) + prompt W4A4", "Atom_BiSup W4A4", "prompt quantized like the rest",
    ):  # fmt: skip
        assert name in words, name


def test_the_same_runs_give_the_same_picture(runs):
    assert errors(runs) == errors(runs)


def test_the_text_along_which_errors_are_shown_is_one_that_all_runs_have(tmp_path):
    more = Run.read(write_run(tmp_path / "a", analysis=analysis_of(0.2, ("calibration", "wiki.txt", "c4"))))
    less = Run.read(write_run(tmp_path / "b", results_of(RTN), analysis_of(0.4)))
    words = text_of(errors([more, less]))
    assert "c4" in words
    assert "along wiki.txt, behind the last block" in words


def test_labels_tell_runs_apart_and_say_no_more(tmp_path):
    assert labels([run_of(tmp_path / "a", 0.1), run_of(tmp_path / "b", 0.2, RTN | NO_PROMPT)]) == [
        "Atom_BiSup W4A4", "Atom (RTN) W4A4",
    ]  # fmt: skip
    seeds = [run_of(tmp_path / name, 0.1, {"seed": seed}) for seed, name in enumerate("cd")]
    assert labels(seeds) == [f"Atom_BiSup W4A4 ({run.folder})" for run in seeds]
    models = [run_of(tmp_path / name, 0.1, checkpoint=f"org/{name}") for name in "ef"]
    assert labels(models) == ["e Atom_BiSup W4A4", "f Atom_BiSup W4A4"]


def test_many_runs_differ_in_colour_or_marker():
    assert len({series(place) for place in range(30)}) == 30


def test_compare_writes_and_names_the_chart_of_the_runs_that_were_analyzed(tmp_path, capsys):
    settings = {"a": RTN, "b": {}, "c": GPTQ}
    found = [run_of(tmp_path / name, 0.2, entry, analyzed=name != "c") for name, entry in settings.items()]
    folders = [str(run.folder) for run in found]
    assert main(["compare", *folders, f"--output={tmp_path / 'out'}"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert str(tmp_path / "out" / "errors.svg") in output
    assert "analyze" not in output
    assert (tmp_path / "out" / "errors.svg").read_text(encoding="utf-8") == errors(found[:2])


def test_compare_of_runs_that_were_not_analyzed_says_what_to_run(tmp_path, capsys):
    runs = [str(run_of(tmp_path / name, 0.1, analyzed=False).folder) for name in "ab"]
    assert main(["compare", *runs, f"--output={tmp_path / 'out'}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "analyze" in line]
    assert "no run is analyzed" in line
    assert "main.py analyze --run_dir" in line
    assert not (tmp_path / "out" / "errors.svg").exists()
    assert (tmp_path / "out" / "compare.md").is_file()
    assert main(["compare", *runs]) == 0
    assert "analyze" not in capsys.readouterr().out
