"""report.html says what results.json says, needs nothing but itself, and shows its figures in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib import image

from bisup_lightning.cli import main
from bisup_lightning.report import charts
from bisup_lightning.report.page import duration, render, size, write_report
from bisup_lightning.report.run import Run
from tests.report.runs import results_of, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.words.append(data)


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def page(folder):
    return Elements(render(Run.read(folder)))


def test_the_summary_says_what_was_gained_and_at_what_price(page):
    assert "models/<tiny> at W4A4KV4" in page.text
    assert "BiSup on Atom, calibrated on 128 × 2048 tokens of wikitext2, prompt: bos." in page.text
    assert "3.0× smaller 3.0 MiB → 1.0 MiB" in page.text
    assert "+25.0 % 10.00 → 12.50" in page.text
    assert "25.0 % of tokens get another likeliest successor; mean KL 0.125 nats" in page.text
    assert "2 min 5 s 700.0 MiB of memory at most, no GPU" in page.text
    assert "learning found nothing better: block 2." in page.text
    assert "The weights take 33 % of the space" in page.text


def test_tables_hold_every_figure(page):
    assert "wikitext2 11.0000 10.0000 12.5000 +25.0 % 0.1250 75.0 % 49.00 2.0000" in page.text
    assert "device an abacus torch 2.13.0 python 3.11.7" in page.text
    assert "checkpoint: models/<tiny> seed: 0" in page.text
    assert "Zero-shot" not in page.text


def test_zero_shot_stands_with_its_standard_error(tmp_path):
    scores = {key: {"value": value, "stderr": 0.0125} for key, value in (("fp", 0.5), ("fp_prompt", 0.55), ("quantized", 0.45))}  # fmt: skip  # noqa: E501
    results = results_of(zero_shot={"piqa": {"metric": "acc_norm", "documents": 400, **scores}})
    text = Elements(render(Run.read(write_run(tmp_path / "run", results)))).text
    assert "piqa acc_norm 50.00 ± 1.25 55.00 ± 1.25 45.00 ± 1.25 400" in text


def test_a_gpu_run_names_its_device_memory(tmp_path):
    run = write_run(tmp_path / "run", results_of(peak_device_bytes=3 * 2**30))
    assert "3.0 GiB on the device at most" in Elements(render(Run.read(run))).text


def test_nothing_is_fetched_and_nothing_runs(page):
    assert not {"script", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "style", "clip-path"):
            for reference in re.findall(r"url\(([^)]*)\)", attributes.get(name) or "") or [attributes.get(name)]:
                if name in ("style", "clip-path") and "url" not in (attributes.get(name) or ""):
                    continue
                assert reference is None or reference.startswith(("#", "data:")), (tag, name, reference)
        assert not [name for name in attributes if name.startswith("on")]


def test_ids_are_unique_and_every_reference_has_its_target(folder):
    html = render(Run.read(folder))
    ids = [attributes["id"] for _, attributes in Elements(html).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_figures_are_those_that_the_run_has_data_for(folder, page):
    drawn = {"block_loss", "error_propagation", "perplexity", "loss_curves", "time_line"}
    assert charts.all_of(Run.read(folder)).keys() == drawn
    assert [tag for tag, _ in page.elements].count("svg") == len(drawn)
    shutil.rmtree(folder / "logs")
    assert charts.all_of(Run.read(folder)).keys() == drawn - {"loss_curves"}


def test_axes_have_names_and_units_and_the_kept_block_a_mark(folder):
    figures = charts.all_of(Run.read(folder))
    assert "time (s)" in figures["time_line"]
    assert "mean square error (log scale)" in figures["block_loss"]
    assert "kept its start" in figures["block_loss"]
    for name in ("block_loss", "error_propagation", "time_line"):
        assert ">block</text>" in figures[name]
    blocks = [block | {"kept_start": False} for block in results_of()["blocks"]]
    moved = Run(folder, results_of(blocks=blocks))
    assert "kept its start" not in charts.all_of(moved)["block_loss"]


def bars(svg):
    """Left end and width of the filled rectangles within the axes, in the picture's units, in the order of drawing."""
    found = []
    for path, style in re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="(fill[^"]+)"', svg):
        if "fill: none" not in style:
            corners = [float(x) for x, _ in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
            found.append((min(corners), max(corners) - min(corners)))
    return found


def test_the_time_of_a_block_is_divided_among_its_phases(folder):
    """One bar for each block, as long as its parts, which follow each other without a gap; shares are of the whole."""
    svg = charts.all_of(Run.read(folder))["time_line"]
    for label in ("read 1 %", "full precision 7 %", "solve 92 %"):
        assert f">{label}</text>" in svg
    read, precise, solve = (bars(svg)[place : place + 2] for place in (0, 2, 4))
    second = read[0][1]  # the first block was read in one second
    assert [width / second for _, width in precise] == pytest.approx([4, 4.75], rel=0.01)
    assert [width / second for _, width in solve] == pytest.approx([95, 20], rel=0.01)
    for block in range(2):
        for (start, width), (follower, _) in pairwise(part[block] for part in (read, precise, solve)):
            assert start + width == pytest.approx(follower, abs=0.01)


def test_the_parts_of_a_block_are_told_apart_without_colour():
    """Neighbours differ in their pattern, or in brightness by a quarter of its range."""

    def brightness(colour):
        red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for (colour, hatch), (other, other_hatch) in pairwise(charts.PHASES):
        assert hatch != other_hatch or abs(brightness(colour) - brightness(other)) > 0.25


def test_a_run_without_phases_has_its_time_in_one_piece(folder):
    blocks = [{key: value for key, value in block.items() if key != "phases"} for block in results_of()["blocks"]]
    assert ">in all 100 %</text>" in charts.all_of(Run(folder, results_of(blocks=blocks)))["time_line"]


def test_the_same_run_gives_the_same_page(folder):
    assert render(Run.read(folder)) == render(Run.read(folder))


def test_a_run_that_measured_nothing_and_logged_nothing_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", results_of(perplexity={}))
    shutil.rmtree(run / "logs")
    text = Elements(render(Run.read(run))).text
    assert "3.0× smaller" in text
    assert "Price" not in text


def test_epochs_learned_twice_count_once(folder):
    """After a NaN a block is learned again, and its log begins anew within the same file."""
    log = folder / "logs" / "00000" / "metrics.csv"
    log.write_text("epoch,loss,step\n0,0.9,7\n1,nan,15\n0,0.4,7\n1,0.3,15\n")
    assert [row["loss"] for row in Run.read(folder).epochs[0]] == [0.4, 0.3]


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")])
def test_sizes_in_words(count, words):
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (119.7, "2 min 0 s"), (12_000, "3 h 20 min")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_command_writes_the_page_and_refuses_an_unfinished_run(folder, tmp_path, capsys):
    assert main(["report", f"--run_dir={folder}"]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == render(Run.read(folder))
    capsys.readouterr()
    assert main(["report", f"--run_dir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no finished run" in line


@pytest.mark.parametrize("command", [["report", "--run_dir={}"], ["compare", "{}", "{}"]])
@pytest.mark.parametrize("content", [b"", b'{"checkpoint": "mod', b"\xff\xfe", b"[]", b"null", b'{"perplexity": {}}'])
def test_damaged_results_are_one_line_that_names_the_file_and_the_remedy(folder, capsys, command, content):
    (folder / "results.json").write_bytes(content)
    assert main([word.format(folder) for word in command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {folder / 'results.json'} is damaged (")
    assert line.endswith("; run fit again, which mends it")
    assert not (folder / "report.html").exists()


def test_a_damaged_analysis_is_named_with_another_remedy(folder, capsys):
    (folder / "analysis.json").write_text('{"sets": ')
    assert main(["report", f"--run_dir={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder / 'analysis.json'} is damaged (")
    assert line.endswith("; run analyze again")


@pytest.mark.parametrize(
    "content", [b"epoch,loss\n0,a", b"epoch,loss\n0,1,2", b"epoch,loss\n\xff", b"epoch\0,loss\n\0,0"]
)
def test_a_damaged_log_is_named_with_its_remedy(folder, capsys, content):
    log = folder / "logs" / "00000" / "metrics.csv"
    log.write_bytes(content)
    assert main(["report", f"--run_dir={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {log} is damaged (")
    log.unlink()
    assert main(["report", f"--run_dir={folder}"]) == 0


def browse(path, *arguments):
    """What Chromium says on its standard error, console messages included, with no way to any host."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1100,2200",
        f"--user-data-dir={path.parent / 'profile'}",
    ]  # fmt: skip
    command = [CHROMIUM, *options, *arguments, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_figures_and_has_nothing_to_complain_about(folder):
    path, picture = write_report(folder), folder / "page.png"
    assert "CONSOLE" not in browse(path, f"--screenshot={picture}")
    pixels = image.imread(picture)[..., :3]
    for colour in (charts.BLUE, charts.VERMILLION, charts.ORANGE):
        wanted = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) < 0.02).sum() > 20, colour
    noisy = folder / "noisy.html"
    noisy.write_text("<script>console.error('heard')</script>")
    assert "CONSOLE" in browse(noisy, f"--screenshot={picture}")  # so that silence means something
