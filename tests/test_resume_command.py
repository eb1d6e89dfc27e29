"""``harness.py --resume RUN``: the run's own config, found by name or path; and the hint that ends a stopped run."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import harness
from harness_params import dump_yaml, load_config, make_config
from tests.conftest import ROOT, Finished
from tests.processes import Forks
from tests.test_resume_rules import contents
from tests.traps import KINDS, StopAt
from utils.config.options import show
from utils.config.run_folder import find_run

GO_ON = "; go on with: python harness.py "


@pytest.fixture(scope="module")
def undisturbed(forks) -> Finished:
    return forks("whole", **KINDS["wr"])


def hinted(done: Finished) -> list[str]:
    """The words after harness.py that a stopped run asks to be started with."""
    return shlex.split(done.last_line.partition(GO_ON)[2])


def saved_runs(folder: Path, *names: str) -> None:
    """Folders of runs that have begun."""
    for name in names:
        (folder / name).mkdir(parents=True)
        cfg = make_config({"optimizer": {"lr": 0.3}, "experiment_params": {"base_dir": "gone", "expt_name": "old"}})
        (folder / name / "expt_config.yaml").write_text(dump_yaml(cfg))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_hint_of_a_stopped_run_is_a_command_that_goes_on(undisturbed, tmp_path):
    """Pasted as it stands, in a folder that a shell would split; again and again, to the same figures."""
    fork = Forks(tmp_path / "bob's runs", logs=tmp_path)
    words, stops = None, 0
    for steps in (5, 20, 1000):
        done = fork.start("run 1", words=words, trap=StopAt(steps), **KINDS["wr"]).finish(None)
        if done.status == 0:
            break
        words, stops = hinted(done), stops + 1
        assert words == ["--resume", str(fork.folder / "run 1")]
    assert done.status == 0 and stops == 2
    done.assert_same_figures(undisturbed)


def test_options_on_top_are_in_the_next_hint(fork, undisturbed):
    fork("run", status=143, trap=StopAt(5), **KINDS["wr"])
    place = ["--resume", f"{fork.folder}/run/"]
    more = ["--experiment_params.save_every_minutes=0.5", "--prune_params.num_levels=4"]
    second = fork("run", status=143, trap=StopAt(3), words=[*place, *more])
    assert hinted(second) == ["--resume", str(second.path), "--experiment_params.save_every_minutes=0.5"]
    assert len(fork("run", words=hinted(second)).csv("summary")) == 4


def test_options_that_change_the_experiment_are_refused(fork, undisturbed):
    words = ["--resume", str(undisturbed.path), "--optimizer.lr=0.7"]
    refused = fork("whole", status=2, words=words)
    assert refused.err == ("harness: optimizer.lr: 0.7 would change the experiment being resumed, where it is 0.1\n")


def test_a_finished_run_says_so_in_one_line(fork, undisturbed):
    run = fork.folder / "moved"  # and renamed: its config knows another name and folder
    shutil.copytree(undisturbed.path, run)
    before = contents(run)
    done = fork("moved", words=["--resume", str(run)])
    more = "--prune_params.num_levels=4 or more trains on"
    assert done.out == f"moved in {fork.folder}: finished, all 3 levels are trained; {more}\n"
    assert done.err == "" and contents(run) == before


def test_a_study_that_is_made_shorter_is_finished(fork):
    """The new number of levels is written down, though nothing is trained."""
    fork("run", status=143, trap=StopAt(80), **KINDS["imp"])
    done = fork("run", words=["--resume", str(fork.folder / "run"), "--prune_params.num_levels=2"])
    assert "finished, all 2 levels are trained" in done.out and len(done.out.splitlines()) == 1
    assert yaml.safe_load((done.path / "expt_config.yaml").read_text())["prune_params"]["num_levels"] == 2


def test_a_taken_name_is_answered_with_the_command_that_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["harness.py"])
    saved_runs(tmp_path, "a")
    assert harness.main([f"--experiment_params.base_dir={tmp_path}", "--experiment_params.expt_name=a"]) == 2
    assert f"resume it with python harness.py --resume {tmp_path}/a or choose" in capsys.readouterr().err


# --- which run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with runs in the default base_dir and elsewhere."""
    monkeypatch.chdir(tmp_path)
    saved_runs(tmp_path / "experiments", "imp_seed0", "imp_seed1", "lrr")
    saved_runs(tmp_path / "experiments" / "grid", "snip")
    saved_runs(tmp_path / "far", "lrr", "wr")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "base_dir", "name"),
    [
        (["--resume", "lrr"], "./experiments", "lrr"),
        (["--resume=lrr"], "./experiments", "lrr"),
        (["--resume", "experiments/lrr/"], "./experiments", "lrr"),
        (["--resume", "grid/snip"], "experiments/grid", "snip"),
        (["--resume", "experiments/grid/snip/"], "experiments/grid", "snip"),
        (["--resume", "far/lrr"], "far", "lrr"),
        (["--resume", "lrr", "--experiment_params.base_dir=far"], "far", "lrr"),
        (["--resume", "./far/lrr/", "--experiment_params.base_dir=far"], "far", "lrr"),
    ],
)
def test_a_run_is_found_by_name_and_by_path(here, words, base_dir, name):
    """The run's own options, resumed where it lies, without a note on the name that it had."""
    cfg = load_config(words)
    e = cfg.experiment_params
    assert (e.base_dir, e.resume_expt_name, cfg.optimizer.lr) == (base_dir, name, 0.3)
    assert cfg.notes == ()


def test_base_dir_may_be_the_folder_of_the_path_in_other_words(here):
    e = load_config(["--resume", f"{here}/far/lrr", "--experiment_params.base_dir=far"]).experiment_params
    assert (e.base_dir, e.resume_expt_name) == ("far", "lrr")


def test_a_run_is_found_from_within(here, monkeypatch):
    monkeypatch.chdir(here / "far" / "wr")
    assert find_run(".", "./experiments") == here / "far" / "wr"
    monkeypatch.chdir(here / "far")
    assert find_run("wr", "./experiments") == Path("wr")


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        (["--resume", "imp_seed2"],
         ["--resume: imp_seed2: no run in ./experiments; did you mean imp_seed1 or imp_seed0?"]),
        (["--resume", "nothing_like_it"], ["--resume: nothing_like_it: no run in ./experiments"]),
        (["--resume", "far/wrr"],
         ["--resume: far/wrr: no run at far/wrr; did you mean far/wr or far/lrr?"]),
        (["--resume", "far/"], ["--resume: far/: no run: far holds 2, such as far/lrr"]),
        (["--resume", "."],
         ["--resume: .: no run: . has no expt_config.yaml; a run that was stopped before it began is started again"]),
        (["--resume", "far/lrr", "--experiment_params.base_dir=experiments/grid"],
         ["experiment_params.base_dir: experiments/grid is not allowed: --resume has the path of a run in far; "
          "leave it out"]),
        (["--resume", "lrr", "--config", "x.yaml"],
         ["--config: not allowed beside --resume, which takes the run's own config; keep one"]),
        (["--resume", "lrr", "--experiment_params.resume_expt_name=lrr"],
         ["--resume: lrr is not allowed beside experiment_params.resume_expt_name; keep one"]),
        (["--resume="], ['--resume: "" is not allowed: the name or the folder of a run']),
        (["--resume", "x" * 300], [f"--resume: {show('x' * 300)}: no run in ./experiments"]),
        (["--resume", "nowhere", "--optimizer.lr=fast", "--optimiser.lr=1"],
         ["--resume: nowhere: no run in ./experiments", "optimiser: unknown section",
          "optimizer.lr: fast is not allowed: a number"]),
    ],
)  # fmt: skip
def test_what_is_no_run_is_a_fault(here, words, faults, capsys):
    """Exit 2, all faults at once, names that are near; nothing is created."""
    before = contents(here)
    assert harness.main(words) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line[: len(fault) + 9] for line, fault in zip(told, faults, strict=True)] == [
        f"harness: {fault}" for fault in faults
    ]
    assert contents(here) == before


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "optimizer: {lr: x}", "optimizer: {lrr: 1}"])
def test_a_damaged_config_is_a_fault(here, text, capsys):
    (here / "far" / "wr" / "expt_config.yaml").write_text(text)
    assert harness.main(["--resume", "far/wr"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- torchrun --------------------------------------------------------------------------------------------------------


def test_under_torchrun_the_hint_has_its_words(tmp_path):
    script = tmp_path / "harness.py"
    program = "from utils.runs.hints import _program; print(_program(), flush=True)"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}\n")
    words = ["--standalone", "--nproc_per_node", "1", "--max-restarts=2", str(script)]
    torchrun = [str(Path(sys.executable).parent / "torchrun"), *words]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.strip() == str(["torchrun", *words]), done.stderr
