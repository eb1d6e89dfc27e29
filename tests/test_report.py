"""``python -m utils.report``: the page's tables and figures, and the page in a real browser."""

import contextlib
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.browser import PATIENCE, Browser
from tests.conftest import ROOT
from tests.plot_helpers import groups_of, write_run, write_study
from tests.processes import Forks
from utils.report import main
from utils.reports import page as pages
from utils.reports.pictures import Picture
from utils.reports.study import compared_densities

SMALL = {"prune_params.num_levels": 2, "experiment_params.epochs_per_level": 2}
IMP = (0x00, 0x72, 0xB2)  # the colour of its line, in every figure
# Two folders whose path is a script.
HOSTILE = Path("<script>document.title='taken'<") / "script> $\\bad &amp; <b>"


class Page(html.parser.HTMLParser):
    """What a browser would show: the text of the cells of each section's tables, and all texts.

    Attributes:
        tables: {id of a section: its tables, rows of cells}.
        tags: all start tags, in order.
        data: contents of the blocks of JSON.
    """

    def __init__(self, source: str):
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = defaultdict(list)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.data: list = []
        self.section, self.in_cell = "", False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "table":
            self.tables[self.section].append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])
        self.in_cell = tag in ("td", "th") or (self.in_cell and tag == "small")
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and data.strip().startswith("["):
            self.data.append(json.loads(data))
        elif self.in_cell:
            self.tables[self.section][-1][-1][-1] += data
        self.texts.append(data)

    def frame(self, section: str, place: int = 0) -> pd.DataFrame:
        head, *rows = self.tables[section][place]
        return pd.DataFrame([[cell.strip() for cell in row] for row in rows], columns=head)


@dataclass
class Report:
    folder: Path
    file: Path
    source: str
    err: str

    @property
    def page(self) -> Page:
        return Page(self.source)


def report(*words, status: int = 0) -> None:
    assert main([str(word) for word in words]) == status


@pytest.fixture(scope="module")
def real(forks: Forks) -> Report:
    """Of real runs: IMP of two seeds, SNIP in a folder with a hostile name; an unfinished and two damaged runs."""
    folder = forks.folder
    for seed in (0, 1):
        forks(f"imp_{seed}", timeout=PATIENCE, **{"experiment_params.seed": seed}, **SMALL)
    snip = {"prune_params.er_method": "snip", "prune_params.er_init": 0.5, "prune_params.num_levels": 1}
    forks("snip", timeout=PATIENCE, **{**SMALL, **snip})
    (folder / HOSTILE).parent.mkdir()
    (folder / "snip").rename(folder / HOSTILE)
    for name in ("not_begun", "no_layers", "torn"):
        shutil.copytree(folder / "imp_0", folder / name)
    (folder / "not_begun" / "metrics" / "summary.csv").unlink()
    (folder / "no_layers" / "metrics" / "layerwise_density.csv").unlink()
    (folder / "torn" / "metrics" / "epochwise_metrics" / "level_1_metrics.csv").write_text("epoch,train_loss\n0,")
    file = folder / "report.html"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        report(folder, folder / HOSTILE.parent, "--out", file)
    assert str(file) in out.getvalue()
    return Report(folder, file, file.read_text(), err.getvalue())


# --- what the page says ----------------------------------------------------------------------------------------------


def test_tables_hold_what_the_runs_left(real):
    shown = real.page.frame("methods", 1).set_index("run")
    assert set(shown.index) == {"imp_0", "imp_1", str(HOSTILE)}
    for name, row in shown.iterrows():
        summary = pd.read_csv(real.folder / str(name) / "metrics" / "summary.csv")
        assert row["levels"] == f"{len(summary)} of {len(summary)}"
        assert row["accuracy there (%)"] == f"{summary['final_test_acc'].iloc[-1]:.2f}"
        assert row["method"] == ("SNIP" if name == str(HOSTILE) else "IMP")
    accuracies = [pd.read_csv(real.folder / f"imp_{seed}/metrics/summary.csv")["final_test_acc"] for seed in (0, 1)]
    points = real.page.frame("accuracy")
    assert list(points["density (%)"]) == ["100", "50", "50"] and list(points["seeds"]) == ["2", "2", "1"]
    for level in (0, 1):
        values = [one[level] for one in accuracies]
        expected = [sum(values) / 2, min(values), max(values)]
        assert list(points.iloc[level, 2:5]) == [f"{value:.2f}" for value in expected]


def test_config_and_environment(real):
    differing = real.page.frame("config").set_index("option")
    assert differing.loc["experiment_params.seed"].tolist() == ["0, 1", "0"]
    assert differing.loc["prune_params.er_init", "SNIP"] == "0.5"
    assert "experiment_params.expt_name" not in differing.index
    facts = real.page.frame("environment").set_index("fact")["value"]
    assert facts["torch"] == torch.__version__
    by_run = real.page.frame("environment", 1).set_index("run")
    assert by_run.loc["imp_0", ["environment", "starts"]].tolist() == ["1", "1"]
    assert "experiment_params.expt_name=imp_0" in by_run.loc["imp_0", "last command"]


def test_overlap_is_that_of_the_masks(real):
    masks = []
    for run in (real.folder / "imp_0", real.folder / "imp_1", real.folder / HOSTILE):
        level = max(int(re.sub(r"\D", "", file.name)) for file in (run / "checkpoints").glob("model_level_*.pt"))
        state = torch.load(run / "checkpoints" / f"model_level_{level}.pt", weights_only=True)
        masks.append(torch.cat([mask.flatten() for name, mask in state.items() if name.endswith("_mask")]))

    def iou(a: int, b: int) -> float:
        return float((masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum())

    matrix = real.page.tables["overlap"][0]
    assert [row[0].strip() for row in matrix[1:]] == ["1 IMP (50%)", "2 SNIP (50%)"]
    assert matrix[1][1].split()[0] == f"{iou(0, 1):.3f}"
    assert matrix[2][1].split()[0] == f"{(iou(0, 2) + iou(1, 2)) / 2:.3f}"
    assert matrix[2][2:] == [""], "one network of SNIP has no pair"
    pairs = real.page.frame("overlap", 1)
    assert pairs["IoU"].tolist() == [f"{iou(a, b):.4f}" for a, b in ((0, 1), (0, 2), (1, 2))]


def test_runs_that_do_not_fit_are_left_out_and_named(real):
    reasons = {"not_begun": "0 of 2 levels", "no_layers": "layerwise_density.csv: no such file", "torn": "level_1"}
    for name, reason in reasons.items():
        (line,) = [line for line in real.err.splitlines() if name in line]
        assert line.startswith("report: note: left out: ") and reason in line
        assert any(text.startswith("left out: ") and name in text and reason in text for text in real.page.texts)


def test_unfinished_runs_have_their_levels_and_copies_are_left_out(tmp_path, capsys):
    half = write_run(tmp_path, "half", [90, 91], planned=5)
    write_run(tmp_path, "its_copy", [90, 91], planned=5)
    write_run(tmp_path, "nothing", [90, 91], [1, 0], seed=1)
    report(tmp_path, "--out", tmp_path / "r.html")
    told = capsys.readouterr().err
    assert "half is unfinished: 2 of 5 levels" in told
    assert f"its_copy is the same experiment with the same seed as {half}" in told
    assert f"left out: {tmp_path / 'nothing'}: a density is not above 0" in told
    page = Page((tmp_path / "r.html").read_text())
    assert page.frame("methods", 1)["levels"].tolist() == ["2 of 5"]
    assert any("There is one run only" in text for text in page.texts)


def test_densities_of_comparison(tmp_path):
    """IMP stands at 1, 0.5 and 0.25; SNIP at 0.5 and 0.1: both have 0.5. Of IMP alone, all but the dense."""
    assert compared_densities(groups_of(write_study(tmp_path / "both"))) == [0.5]
    levels = [0.8**level for level in range(10)]
    write_run(tmp_path / "one", "imp", [90] * 10, levels)
    write_run(tmp_path / "one", "lrr", [90] * 10, [d * 1.001 for d in levels[:1]] + levels[1:],
              **{"experiment_params.training_type": "lrr"})  # fmt: skip
    assert compared_densities(groups_of(tmp_path / "one")) == pytest.approx([0.8**3, 0.8**6, 0.8**9])
    write_run(tmp_path / "dense", "dense", [90])
    assert compared_densities(groups_of(tmp_path / "dense")) == [1.0]


# --- names are text --------------------------------------------------------------------------------------------------


def contents(text: str) -> pages.Contents:
    frame = pd.DataFrame({text: [text]})
    picture = Picture(text, "data:,", 100, [(0.5, 0.5, text)])
    return pages.Contents(
        text, text, [text], text, frame, frame, [picture, Picture(text, problem=text)], frame, [picture], [picture],
        (frame, frame, frame), (frame, frame, frame), overlap_note=text,
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1))
def test_any_name_is_shown_as_it_is(text):
    plain, page = Page(pages.render(contents("name"))), Page(pages.render(contents(text)))
    assert page.tags == plain.tags
    assert {cell for tables in page.tables.values() for rows in tables for row in rows for cell in row} == {text}
    assert [spots[0][2] for spots in page.data] == [text] * 3


def test_the_page_names_no_other_address(real):
    source = real.source.replace("http://www.w3.org", "")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:image/svg\+xml;base64,|#)""", source)
    assert "@import" not in source and "fetch(" not in source and "XMLHttpRequest" not in source


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


VISIBLE = "[...document.querySelectorAll('#{} .choice')].map(choice => choice.checkVisibility())"
# The place of spot number N in the window, of the figure that is seen.
SPOT = """(() => {{
  const plot = [...document.querySelectorAll("#accuracy .plot")].find(plot => plot.checkVisibility());
  plot.scrollIntoView({{block: "center"}});
  const box = plot.getBoundingClientRect();
  const [x, y, text] = JSON.parse(plot.querySelector("script").textContent)[{}];
  return [box.left + x * box.width, box.top + y * box.height, text];
}})()"""
TIP = "[...document.querySelectorAll('.tip')].filter(tip => tip.checkVisibility()).map(tip => tip.textContent)"


def test_the_report_in_a_browser(real, browser):
    browser.open(real.file)
    assert browser.run("document.title") == "Digits: lenet_300_100"
    images = browser.run("[...document.images].map(image => image.complete && image.naturalWidth > 100)")
    assert len(images) >= 6 and all(images)
    assert str(HOSTILE) in browser.run("document.querySelector('#methods details').textContent")

    for place in (0, 1):  # logarithmic, then linear
        browser.run(
            "(select => { select.value = " + str(place) + "; select.dispatchEvent(new Event('change')) })"
            "(document.querySelector('#accuracy select'))"
        )
        assert browser.run(VISIBLE.format("accuracy")) == [place == 0, place == 1]
        browser.move_mouse(5, 5)
        assert browser.run(TIP) == []
        x, y, text = browser.run(SPOT.format(0))
        assert text.startswith("IMP\n100% kept: ") and "2 seeds" in text
        colour = browser.screenshot()[round(y), round(x)]
        assert abs(colour.astype(int) - IMP).max() < 30, "a spot lies on the marker that it speaks of"
        browser.move_mouse(x + 3, y - 3)
        assert text in browser.run(TIP)[0]
    browser.run("document.querySelector('#layers').scrollIntoView()")

    assert {address.partition(":")[0] for address in browser.requests()} == {"file", "data"}
    assert browser.complaints() == []


def test_a_script_that_slipped_in_would_not_run(real, browser, tmp_path):
    """The second wall: were a name not escaped, the page's policy would still stop its script, and say so."""
    evil = "<script>document.title = 'taken'</script><img src='https://example.org/x.png'>"
    (tmp_path / "evil.html").write_text(real.source.replace("<header>", f"<header>{evil}"))
    browser.open(tmp_path / "evil.html")
    assert browser.run("document.title") == "Digits: lenet_300_100"
    assert len(browser.complaints()) >= 2


# --- options and faults ----------------------------------------------------------------------------------------------


def test_tables_alone_need_no_torch_and_say_that_masks_are_missing(tmp_path):
    write_study(tmp_path)
    program = f"""
import sys
from utils.report import main
assert main([{str(tmp_path)!r}, "--out", {str(tmp_path / "r.html")!r}, "--density", "0.3", "--metric", "max"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "r.html").read_text())
    assert any("no checkpoints" in text for text in page.texts)
    assert any(text.strip() == "all methods near 30%" for text in page.texts)
    assert page.frame("accuracy")["accuracy (%)"][0] == "91.00"  # max_test_acc is one more than final_test_acc
    assert set(page.frame("environment")["environment"]) == {"not noted"}


def test_a_figure_that_cannot_be_drawn_says_why(tmp_path):
    """Twenty methods are too many lines for one figure; the tables still stand."""
    for n in range(20):
        write_run(tmp_path, f"run_{n}", [90], **{"optimizer.lr": 0.01 * (n + 1)})
    report(tmp_path, "--out", tmp_path / "r.html", "--no_overlap")
    page = Page((tmp_path / "r.html").read_text())
    assert sum("Not drawn: 20 lines are asked for" in text for text in page.texts) == 4
    assert len(page.frame("methods")) == 20
    assert any("--no_overlap" in text for text in page.texts)


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["{study}", "--out", "{out}/r.html", "--metric", "loss"], 2, "one of final, max, best_val"),
        (["{study}", "--out", "{out}/r.pdf"], 2, "ends in none of .html"),
        (["{study}", "--out", "{out}/none/r.html"], 2, "no such directory"),
        (["{study}", "--out", "{out}/r.html", "--density", "0.5", "1.5"], 2, "--density: 1.5 is not allowed"),
        (["{out}", "--out", "{out}/r.html"], 1, "neither a run nor a directory of runs"),
        (["{study}", "--out", "{out}/r.html", "--metric", "best_val"], 1, "dataset.validation_images"),
    ],
)
def test_faults_are_one_line_and_write_nothing(words, status, part, tmp_path, capsys):
    study, out = write_study(tmp_path / "study"), tmp_path / "out"
    out.mkdir()
    report(*(word.format(study=study, out=out) for word in words), status=status)
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("report: ") and part in printed.err
    assert list(out.iterdir()) == []


def test_only_damaged_runs_are_refused(tmp_path, capsys):
    run = write_run(tmp_path, "run", [90, 91])
    (run / "metrics" / "summary.csv").write_text("level,density\n0,\n")
    report(tmp_path, "--out", tmp_path / "r.html", status=1)
    told = capsys.readouterr().err
    assert told.startswith(f"report: {run}") and told.count("\n") == 1 and not (tmp_path / "r.html").exists()


def note_precision(run: Path, came_to: str) -> None:
    """What auto has come to in a run that `write_run` made."""
    (run / "artifacts").mkdir(exist_ok=True)
    note = {"settled": {"precision": came_to, "loader": "memory"}}
    (run / "artifacts" / "environment.json").write_text(json.dumps([note]))


def test_copies_are_told_by_what_auto_came_to(tmp_path, capsys):
    """Auto that came to bf16 is the experiment of bf16, and another one than auto that came to fp32."""
    for name, asked, came_to in [("a", "auto", "bf16"), ("b", "bf16", "bf16"), ("c", "auto", "fp32")]:
        run = write_run(tmp_path, name, [90, 91], **{"experiment_params.precision": asked})
        note_precision(run, came_to)
    report(tmp_path, "--out", tmp_path / "r.html")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'b'} is the same experiment with the same seed as {tmp_path / 'a'}" in line
    assert len(Page((tmp_path / "r.html").read_text()).frame("methods", 1)) == 2


def test_a_run_of_another_data_set_is_left_out(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path, f"run{seed}", [90, 91], seed=seed)
    other = write_run(tmp_path, "other", [90, 91], **{"dataset.dataset_name": "MNIST"})
    report(tmp_path, "--out", tmp_path / "r.html")
    assert capsys.readouterr().err.startswith(f"report: note: left out: {other}: its data set is MNIST, not ")


def test_help_loads_nothing_heavy():
    program = """
import sys
from utils.report import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
    assert not {"torch", "matplotlib", "pandas"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--no_overlap" in done.stdout and max(map(len, done.stdout.splitlines())) <= 120
