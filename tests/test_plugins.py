"""Plugins: one's own criteria, networks, data sets, schedules, optimizers, in every program that reads a config."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from harness_params import dump_yaml, load_config, make_config
from harness_utils import load_run
from tests.conftest import ROOT, SMALL
from tests.plot_helpers import groups_of
from tests.processes import in_ranks
from tests.traps import StopAt
from utils import plugins
from utils.analysis.networks import open_bench
from utils.analysis.sources import find_sources
from utils.data.specs import DATASETS
from utils.errors import ConfigError, DataError, RunError
from utils.grids.grid import read_grid
from utils.models import MODELS
from utils.optimizers import OPTIMIZERS
from utils.pruning.methods import METHODS, Method
from utils.pruning_utils import prune
from utils.registry import NameFault, noted, plain
from utils.runs.plugin_files import load_everywhere
from utils.schedulers import SCHEDULES

README = (ROOT / "configs" / "plugins" / "README.md").read_text()
PARTS, CONFIG, COMMAND = re.findall(r"```(?:python|yaml|)\n(.*?)```", README, re.DOTALL)
TABLES = (METHODS, SCHEDULES, DATASETS, OPTIMIZERS, MODELS)

# A criterion that keeps the lowest weights: no other gives its masks.
LOWEST = """
from utils.conv_type import masked_params
from utils.pruning.methods import METHODS, Method
METHODS["lowest"] = Method("Lowest first", lambda model, masks, inputs: [-p.detach().abs() for _, p, _ in masked_params(model)])
"""  # noqa: E501


@pytest.fixture(autouse=True)
def tables():
    """Leaves the tables of this process as they were."""
    before = [dict(table.data) for table in TABLES]
    yield
    for table, lines in zip(TABLES, before):
        table.data = lines
    plugins._by_content.clear()
    plugins._by_path.clear()


@pytest.fixture
def lowest(tmp_path) -> Path:
    return write(tmp_path / "own" / "lowest.py", LOWEST)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def options(path: Path, **more) -> dict:
    return {"experiment_params.plugins": path, "prune_params.prune_method": "lowest", **more}


def faults_of(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(words)
    return caught.value.faults


# --- the lines of the guide ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The folder in which the guide's files were written and its command was given."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "my_parts.py").write_text(PARTS)
    (folder / "my_run.yaml").write_text(CONFIG)
    python, harness, *words = COMMAND.split()
    assert (python, harness) == ("python", "harness.py")
    done = in_folder(folder, str(ROOT / harness), *words)
    assert done.returncode == 0 and "note" not in done.stderr, done.stderr
    return folder


def in_folder(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )  # fmt: skip


def test_the_example_trains_and_is_recorded(example):
    run = example / "experiments" / "lamp"
    summary = pd.read_csv(run / "metrics" / "summary.csv")
    assert summary["density"].tolist() == pytest.approx([1, 0.5, 0.25], abs=1e-4)
    assert summary["final_test_acc"].min() > 60  # of two classes
    state = torch.load(run / "checkpoints" / "model_level_2.pt", weights_only=True)
    assert state["5.weight"].shape == (2, 64) and state["1.weight_mask"].shape == (64, 64)
    rates = pd.read_csv(run / "metrics" / "epochwise_metrics" / "level_0_metrics.csv")["lr"]
    steps = -(-1437 // 128)
    assert rates.tolist() == pytest.approx([1e-3 / steps, 1e-3 * (steps / (steps + 1)) ** 0.5,
                                            1e-3 * (steps / (2 * steps + 1)) ** 0.5])  # fmt: skip
    (record,) = json.loads((run / "artifacts" / "environment.json").read_text())[0]["plugins"]
    assert record["file"] == str(example / "my_parts.py")
    assert record["adds"]["criterion"]["lamp"]["title"] == "LAMP"
    assert {kind: list(lines) for kind, lines in record["adds"].items()} == {
        "criterion": ["lamp"], "model": ["mlp_64"], "schedule": ["InverseSqrt"], "data set": ["EvenOdd"],
        "optimizer": ["rmsprop"],
    }  # fmt: skip
    assert (run / "artifacts" / "plugins" / "my_parts.py").read_text() == PARTS
    assert yaml.safe_load((run / "expt_config.yaml").read_text())["experiment_params"]["plugins"] == ["my_parts.py"]


def test_masks_of_the_example_are_lamps(example):
    """LAMP by hand: level 1 keeps the largest scores of level 0's weights."""
    folder = example / "experiments" / "lamp" / "checkpoints"
    before, after = (torch.load(folder / f"model_level_{level}.pt", weights_only=True) for level in (0, 1))
    names, scores = ["1.weight", "3.weight", "5.weight"], []
    for name in names:
        squares = before[name].double().flatten().square().tolist()
        scores += [w / sum(v for v in squares if v >= w) for w in squares]
    kept = torch.cat([after[f"{name}_mask"].flatten() for name in names])
    best = torch.tensor(scores).topk(int(kept.sum())).indices
    assert kept[best].float().mean() > 0.9995  # ties of the summation's last bits aside


def test_figures_show_the_plugins_title_and_run_no_code(example, tmp_path):
    run = shutil.copytree(example / "experiments" / "lamp", tmp_path / "runs" / "lamp")
    (run / "artifacts" / "plugins" / "my_parts.py").write_text("raise SystemExit('a figure has run this')")
    (group,) = groups_of(tmp_path / "runs")
    assert group.runs[0].method == "Iterative pruning by LAMP + LR rewinding"
    shutil.rmtree(run / "artifacts")  # as if the plugin had gone
    METHODS.data.pop("lamp")
    (group,) = groups_of(tmp_path / "runs")
    assert group.runs[0].method == "Iterative pruning by lamp + LR rewinding"


def test_a_run_with_plugins_is_read_from_anywhere(example, monkeypatch, tmp_path):
    run = shutil.copytree(example / "experiments" / "lamp", tmp_path / "moved")
    monkeypatch.chdir("/")
    loaded = load_run(run)
    correct = sum(int((loaded.model(images).argmax(1) == labels).sum()) for images, labels in loaded.test_batches())
    assert 100 * correct / loaded.data.test.num_images == pytest.approx(loaded.summary["final_test_acc"].iloc[-1])
    (run / "artifacts" / "plugins" / "my_parts.py").write_text(PARTS + "\n")
    with pytest.raises(RunError, match=r"my_parts\.py was changed since the run copied it"):
        load_run(run)
    (run / "artifacts" / "plugins" / "my_parts.py").unlink()
    with pytest.raises(RunError, match=r"my_parts\.py: no such file"):
        load_run(run)


def test_networks_of_two_versions_are_not_compared(example, tmp_path):
    runs = [shutil.copytree(example / "experiments" / "lamp", tmp_path / name) for name in "ab"]
    (runs[1] / "artifacts" / "plugins" / "my_parts.py").write_text(PARTS + "\n")
    file = runs[1] / "artifacts" / "environment.json"
    entries = json.loads(file.read_text())
    entries[0]["plugins"][0]["sha256"] = hashlib.sha256(f"{PARTS}\n".encode()).hexdigest()
    file.write_text(json.dumps(entries))
    sources = find_sources([str(run) for run in runs])
    with pytest.raises(DataError, match=r"plugins are my_parts\.py \w{8}, my_parts\.py \w{8} and my_parts"):
        open_bench(sources, None, None).__enter__()


def test_analyze_and_single_gpu_harness(example):
    done = in_folder(example, "-m", "utils.analyze", "flops", "experiments/lamp")
    assert done.returncode == 0 and "8320" in done.stdout, done.stderr
    words = ["--config", "my_run.yaml", "--experiment_params.expt_name=plain", "--dist_params.threads=1"]
    done = in_folder(example, "-m", "utils.single_gpu_harness", *words)
    assert done.returncode == 0, done.stderr
    lamp, plain_run = (
        torch.load(example / "experiments" / name / "checkpoints" / "model_level_2.pt", weights_only=True)
        for name in ("lamp", "plain")
    )
    assert all(torch.equal(lamp[key], plain_run[key]) for key in lamp)


# --- ranks, resuming -------------------------------------------------------------------------------------------------


def test_two_ranks_and_a_stopped_run(fork, lowest):
    """The same plugin on both ranks; a stopped run goes on, from another place of the file too, to the same bits."""
    whole = fork("whole", **options(lowest, **{"dist_params.nproc": 2}))
    masks = whole.checkpoint("level_1")["fc1.weight_mask"], whole.checkpoint("level_0")["fc1.weight"].abs()
    assert masks[1][masks[0]].mean() < masks[1][~masks[0]].mean(), "the lowest weights are kept"
    moved = write(lowest.parent.parent / "elsewhere" / "lowest.py", LOWEST)
    stopped = fork("stopped", status=143, trap=StopAt(5), **options(lowest))
    again = fork("stopped", resume=True, **options(moved))
    fork("alone", **options(lowest)).assert_same_figures(again)
    assert len(json.loads((stopped.path / "artifacts" / "environment.json").read_text())) == 2


def test_a_changed_plugin_is_refused(fork, lowest):
    run = fork("run", **options(lowest, **{"prune_params.num_levels": 1}))
    more = {"prune_params.num_levels": 2}
    copy = run.path / "artifacts" / "plugins" / "lowest.py"
    lowest.write_text(LOWEST + "# another comment\n")
    done = fork("run", resume=True, status=2, **options(lowest, **more))
    assert done.last_line == (
        "harness: experiment_params.plugins: lowest.py has changed since the run being resumed began with it; "
        f"the run's copy is {copy}"
    )
    done = fork("run", resume=True, status=2, **{"experiment_params.plugins": None, **more})
    assert f"began with lowest.py: name it, or the copy {copy}" in done.err
    other = write(lowest.parent / "other.py", "")
    done = fork("run", resume=True, status=2, **options(f"{copy},{other}", **more))
    assert "other.py would change the experiment being resumed, which began without it" in done.last_line
    assert fork("run", resume=True, **options(copy, **more)).csv("summary")["level"].tolist() == [0, 1]
    plain_run = fork("plain", **{"prune_params.num_levels": 1})
    done = fork("plain", resume=True, status=2, **options(copy, **more, **{"prune_params.prune_method": "mag"}))
    assert "lowest.py would change the experiment" in done.last_line and plain_run.path.exists()


def load_own(ctx, folder: Path) -> None:
    path = str(folder / str(ctx.rank) / "lowest.py")
    cfg = make_config({"experiment_params": {"plugins": [path]}})
    with pytest.raises(RunError, match="have read different files"):
        load_everywhere(cfg, ctx)


def test_ranks_with_different_files_end_together(tmp_path):
    for rank in range(2):
        write(tmp_path / str(rank) / "lowest.py", f"{LOWEST}# {rank}\n")
    in_ranks(2, load_own, tmp_path)


# --- versions --------------------------------------------------------------------------------------------------------


def test_two_versions_are_two_lines_of_a_figure(fork, lowest):
    short = {"prune_params.num_levels": 2, "experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0}
    fork("a", **options(lowest, **short))
    fork("b", **options(lowest, **short, **{"experiment_params.seed": 1}))
    lowest.write_text(LOWEST.replace("Lowest first", "Lowest") + "# the second version\n")
    fork("c", **options(lowest, **short, **{"experiment_params.seed": 2}))
    fork("d", **short, **{"experiment_params.plugins": lowest})  # uses nothing of it
    groups = sorted(groups_of(fork.folder), key=lambda group: group.label)
    assert [group.seeds for group in groups] == [1, 2, 1] or [group.seeds for group in groups] == [1, 1, 2]
    words = [group.label for group in groups]
    assert words[0] == "IMP" and all(re.search(r"prune method from lowest\.py [0-9a-f]{8}$", w) for w in words[1:])
    assert len(set(words)) == 3


def test_the_newest_content_holds_in_a_session(lowest):
    """As in a notebook: the file is edited, and the next config has the new part."""
    make_config({"experiment_params": {"plugins": [str(lowest)]}})
    assert METHODS["lowest"].title == "Lowest first"
    lowest.write_text(LOWEST.replace("Lowest first", "Second"))
    make_config({"experiment_params": {"plugins": [str(lowest)]}})
    assert METHODS["lowest"].title == "Second"
    lowest.write_text(LOWEST.replace("Lowest first", "Third") + "1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        make_config({"experiment_params": {"plugins": [str(lowest)]}})
    assert METHODS["lowest"].title == "Second", "a file that fails leaves nothing behind"


# --- faults ----------------------------------------------------------------------------------------------------------

METHOD_LINE = "from utils.pruning.methods import METHODS, Method\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = 1\ndef f(:\n", "line 2: invalid syntax"),
        ("x = 1\n\ny = z\n", "line 3: NameError: name 'z' is not defined"),
        ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f():\n    raise OSError('a\\nb')\nf()\n", "line 2: OSError: a b"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        (b"\xff\xfe\x00", ""),
        (METHOD_LINE + "METHODS['Snip'] = Method('x', print)",
         "line 2: criterion Snip: the harness has one of this name; choose another name"),
        (METHOD_LINE + "METHODS['lowest'] = print",
         "line 2: criterion lowest: Method is expected, not builtin_function_or_method"),
        (METHOD_LINE + "METHODS['low est'] = Method('x', print)",
         "line 2: criterion 'low est': a name is a word without spaces, commas and colons"),
        ("from utils.models import MODELS\nMODELS['resnet-18'] = print",
         "line 2: model resnet-18: the harness has one of this name; choose another name"),
        ("from utils.models import MODELS\nMODELS['mine'] = 3", "line 2: model mine: Callable is expected, not int"),
    ],
)  # fmt: skip
def test_a_fault_of_a_plugin_is_one_line(tmp_path, text, fault):
    """And the names that it would have added are no further faults; other options are checked with it."""
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = [dict(table.data) for table in TABLES]
    asked = [f"--experiment_params.plugins={path}", "--prune_params.prune_method=lowest", "--optimizer.lr=-1"]
    found, lr = faults_of(*asked)
    assert found.startswith(f"experiment_params.plugins: {path}: {fault}") and "\n" not in found
    assert lr.startswith("optimizer.lr: -1")
    assert [dict(table.data) for table in TABLES] == before
    assert not [name for name in sys.modules if name.startswith("plugin_mine")]


def test_files_that_cannot_be_loaded_together(tmp_path, lowest, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert faults_of("--experiment_params.plugins=none.py") == [
        f"experiment_params.plugins: none.py: no such file in {tmp_path}, where relative paths start"
    ]
    (found,) = faults_of(f"--experiment_params.plugins={tmp_path}")
    assert found.endswith("cannot be read: Is a directory")
    other = write(tmp_path / "own" / "other.py", LOWEST.replace('"lowest"', '"Low-est"'))
    (found,) = faults_of(f"--experiment_params.plugins={lowest},{other}")
    assert found == f"experiment_params.plugins: {lowest} and {other} both add criterion Low-est"
    same = write(tmp_path / "b" / "lowest.py", "")
    (found,) = faults_of(f"--experiment_params.plugins={lowest},{same}")
    assert found.endswith("two plugins have the same file name")
    (found,) = faults_of(f"--experiment_params.plugins={lowest}", "--prune_params.prune_method=highest")
    assert found.startswith("prune_params.prune_method: highest") and "lowest" in found
    (found,) = faults_of("--prune_params.prune_method=lamp")
    assert found.startswith("prune_params.prune_method: lamp is not allowed")


def test_nothing_is_created_where_a_plugin_is_at_fault(fork, tmp_path):
    broken = write(tmp_path / "own" / "broken.py", "import")
    done = fork("run", status=2, **options(broken))
    assert done.err.splitlines() == [f"harness: experiment_params.plugins: {broken}: line 1: invalid syntax"]
    assert not done.path.exists()
    nameless = write(tmp_path / "own" / "nameless.py", f"{METHOD_LINE}METHODS['lowest'] = Method('x', 'no_scores')")
    done = fork("run", status=2, **options(nameless))
    assert done.last_line == "harness: criterion lowest: score 'no_scores' is no function of utils.pruning.scores"
    assert not done.path.exists()


def test_scores_of_other_shapes_are_refused(fork, tmp_path):
    flat = LOWEST.replace("-p.detach().abs()", "-p.detach().abs().flatten()")
    done = fork("run", status=1, **options(write(tmp_path / "own" / "flat.py", flat)))
    assert "lowest to density 0.5: scores of shapes [(19200,)" in done.last_line


# --- what is told ----------------------------------------------------------------------------------------------------


def test_a_plugin_without_effect_is_noted(tmp_path, lowest):
    empty = write(tmp_path / "own" / "empty.py", "x = 1\n")
    cfg = make_config({"experiment_params": {"plugins": [str(lowest), str(empty)]}})
    notes = [str(note) for note in cfg.notes if note.option == "experiment_params.plugins"]
    assert notes == [
        f"experiment_params.plugins: {lowest} has no effect: it adds lowest, which no option names",
        f"experiment_params.plugins: {empty} has no effect: it adds no line to a table",
    ]
    used = cfg.replace({"prune_params": {"prune_method": "lowest"}, "experiment_params": {"plugins": [str(lowest)]}})
    assert not [note for note in used.notes if note.option == "experiment_params.plugins"]
    alone = used.replace({"prune_params": {"num_levels": 1}})  # nothing is pruned
    assert [note for note in alone.notes if note.option == "experiment_params.plugins"]


def test_help_lists_the_names(lowest, capsys):
    with pytest.raises(SystemExit) as ended:
        load_config([f"--experiment_params.plugins={lowest}", "--help"])
    assert ended.value.code == 0 and "er_balanced, lowest" in capsys.readouterr().out
    lowest.write_text("import")
    with pytest.raises(SystemExit) as ended:
        load_config(["--help", f"--experiment_params.plugins={lowest}"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and "prune_params" in out
    assert err == f"harness: note: experiment_params.plugins: {lowest}: line 1: invalid syntax\n"


def test_grids(tmp_path, lowest):
    """Two files may add one name: each run has its own."""
    other = write(tmp_path / "other" / "other.py", LOWEST.replace("-p", "p"))
    runs = {name: options(str(path)) for name, path in (("low", lowest), ("high", other))}
    small = {key: value for key, value in SMALL.items() if key.startswith(("model", "dataset", "optimizer"))}
    grid = {"config": "configs/digits_lenet.yaml", "base_dir": str(tmp_path / "runs"), "set": small, "runs": runs}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    assert [run.cfg.experiment_params.plugins for run in read_grid(str(file)).runs] == [(str(lowest),), (str(other),)]
    lowest.write_text("import")
    with pytest.raises(ConfigError) as caught:
        read_grid(str(file))
    assert caught.value.faults == [f"run low_seed0: experiment_params.plugins: {lowest}: line 1: invalid syntax"]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_criterion_of_ones_own_through_the_python_api():
    """A line in the table is enough for `prune`, without a plugin."""
    from utils.conv_type import insert_masks, masked_params

    METHODS["last_rows"] = Method("Last rows", lambda model, masks, inputs: [
        torch.arange(mask.numel()).view(mask.shape).float() for mask in masks
    ])  # fmt: skip
    model = insert_masks(torch.nn.Linear(4, 5))
    assert prune(model, "last_rows", 0.2) == pytest.approx(0.2)
    ((_, _, mask),) = masked_params(model)
    assert mask[4].all() and not mask[:4].any()


def test_a_line_is_checked_only_while_a_plugin_is_loaded():
    real = METHODS["snip"]
    METHODS["snip"] = real  # a test, or a session, may replace a line
    with noted() as lines, pytest.raises(NameFault):
        METHODS["S-NIP"] = real
    assert lines == [] and plain("ResNet-18_x") == "resnet18x"


def test_a_plugin_has_a_module_of_its_own(tmp_path):
    """Dataclasses, among others, look for it; a file called as a package does not hide that."""
    path = write(tmp_path / "json.py", "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n")
    make_config({"experiment_params": {"plugins": [str(path)]}})
    assert isinstance(sys.modules["json"], types.ModuleType) and hasattr(sys.modules["json"], "loads")


def test_a_resume_from_another_folder_takes_the_copies(tmp_path, monkeypatch):
    """Relative paths start at the working directory; a file that is there is taken, whatever it holds."""
    run, file = tmp_path / "runs" / "a", tmp_path / "lowest.py"
    copy = run / "artifacts" / "plugins" / "lowest.py"
    copy.parent.mkdir(parents=True)
    for path in (file, copy):
        path.write_text(LOWEST)
    monkeypatch.chdir(tmp_path)
    words = ["--experiment_params.plugins=lowest.py", "--prune_params.prune_method=lowest"]
    (run / "expt_config.yaml").write_text(dump_yaml(load_config(words)))
    resume = ["--resume", str(run)]
    assert load_config(resume).experiment_params.plugins == ("lowest.py",)
    monkeypatch.chdir(run)
    assert load_config(resume).experiment_params.plugins == (str(copy),)
    copy.unlink()
    with pytest.raises(ConfigError, match=r"lowest\.py: no such file in .*runs/a, where relative paths start"):
        load_config(resume)
