"""Runs that start from a ticket: as the run that they branch off, resumed, in two processes, and refused."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import harness
from tests.conftest import SMALL
from tests.test_tickets import ONE_LEVEL, SOURCE
from tests.traps import SHORT, DieAt, StopAt, begun
from utils.runs.records import saved_ticket

BRANCH = {**SHORT, "ticket_params.source": "source", "ticket_params.weights": "reinit"}
REWOUND = {**SHORT, "experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1}
REWOUND |= {"ticket_params.source": "source", "ticket_params.weights": "rewind", "ticket_params.level": 1}
FROM_STEP_2 = {
    **REWOUND,
    "ticket_params.step": 2,
    "prune_params.rewind_epoch": None,
    "prune_params.rewind_step": 2,
}  # of 3


@pytest.fixture(scope="module")
def source(forks):
    return forks("source", **SOURCE)


@pytest.fixture(scope="module")
def branch(forks, source):
    return forks("branch", **BRANCH)


def with_source(source, folder: Path) -> None:
    shutil.copytree(source.path, folder / "source")


# --- the same as the run that it branches off ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, 2])
def test_level_0_of_the_source_from_any_step_on(forks, source, step):
    """Its dense mask, its seed, its level number: the branch is the source from that step on, bit for bit."""
    ticket = {"ticket_params.weights": "rewind", "ticket_params.level": 0, "ticket_params.step": step}
    run = forks(f"from_{step}", **ONE_LEVEL, **ticket, **{"ticket_params.source": "source"})
    mine, whole = run.checkpoint("level_0"), source.checkpoint("level_0")
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    epochs = run.csv("epochwise_metrics/level_0_metrics")["epoch"]
    assert list(epochs) == ([1] if step == -1 else [0, 1])


def test_level_0_of_the_source_from_its_init(forks, source):
    options = {"ticket_params.source": str(source.path), "ticket_params.level": 0}  # by its directory
    run = forks("from_init", **ONE_LEVEL, **options)
    mine, whole = run.checkpoint("level_0"), source.checkpoint("level_0")
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_further_levels_go_back_to_the_start_of_the_branch(forks, branch):
    assert list(branch.csv("summary")["density"].round(4)) == [0.25, 0.125]
    init, level_0, level_1 = (branch.checkpoint(name) for name in ("init", "level_0", "level_1"))
    assert not (level_1["fc1.weight_mask"] & ~level_0["fc1.weight_mask"]).any()
    again = {"ticket_params.source": "branch", "ticket_params.level": 1}
    last = forks("again", **ONE_LEVEL, **again)
    start = last.checkpoint("init")
    assert torch.equal(start["fc1.weight"], init["fc1.weight"] * level_1["fc1.weight_mask"])
    assert saved_ticket(last.path)["ticket"]["weights"] == "reinit"  # where its source came from


def test_weight_rewinding_of_a_branch_goes_back_to_the_step_where_it_began(forks, source):
    run = forks("rewound", **REWOUND)
    rewind, init = run.checkpoint("rewind"), run.checkpoint("init")
    assert all(torch.equal(rewind[name], init[name]) for name in init)
    assert list(run.csv("summary")["epochs"]) == [1, 1]
    assert torch.equal(init["fc1.bias"], source.checkpoint("rewind")["fc1.bias"])


def test_pruning_at_initialization_on_loaded_weights(forks, source):
    options = {"ticket_params.source": "source", "ticket_params.mask": "none", "ticket_params.weights": "final"}
    options |= {"prune_params.er_method": "mag", "prune_params.er_init": 0.1, "ticket_params.level": 1}
    run = forks("pruned", **ONE_LEVEL, **options)
    start, final = run.checkpoint("init"), source.checkpoint("level_1")
    weights = torch.cat([final[name].abs().flatten() for name in final if final[name].ndim == 2 and "mask" not in name])
    masks = torch.cat([start[name].flatten() for name in start if name.endswith("_mask")])
    assert weights[masks].min() >= weights[~masks].max()
    assert masks.float().mean() == pytest.approx(0.1, abs=1e-4)


# --- processes, programs, resuming -----------------------------------------------------------------------------------


def test_two_processes_hold_the_same_ticket(forks, branch):
    two = forks("two", **BRANCH, **{"dist_params.nproc": 2})
    mine, other = two.checkpoint("init"), branch.checkpoint("init")
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert saved_ticket(two.path) == saved_ticket(branch.path)


def test_single_process_harness_gives_the_same_bits(launch, fork, source):
    with_source(source, launch.folder)
    run = fork("one", **REWOUND)
    launch("other", program=("-m", "utils.single_gpu_harness"), **REWOUND).assert_same_figures(run)


@pytest.mark.parametrize("options", [BRANCH, REWOUND, FROM_STEP_2], ids=["reinit", "rewind", "step"])
def test_a_resumed_branch_does_not_need_its_source(fork, source, options):
    with_source(source, fork.folder)
    whole = fork("whole", **options)
    fork("mine", status=143, trap=StopAt(2), **options)
    shutil.rmtree(fork.folder / "source")
    run = fork("mine", resume=True, **options)
    run.assert_same_figures(whole)
    assert saved_ticket(run.path) == saved_ticket(whole.path)
    assert run.csv("epochwise_metrics/level_0_metrics")["seconds"].max() < 60


def test_a_branch_without_a_state_reads_its_source_again_and_knows_it(fork, source):
    with_source(source, fork.folder)
    killed = fork.start("mine", trap=DieAt(12), **BRANCH).finish(None)
    assert killed.status == -signal.SIGKILL and begun(killed.path)
    assert not (killed.path / "artifacts" / "state.json").exists()
    moved = {"ticket_params.source": str(fork.folder / "elsewhere")}
    (fork.folder / "source").rename(fork.folder / "elsewhere")
    gone = fork("mine", resume=True, status=2, **BRANCH)
    assert gone.last_line.startswith("harness: ticket_params.source: source: no run and no file at ")
    other = fork("mine", resume=True, status=2, **{**BRANCH, **moved, "ticket_params.level": 1})
    assert "ticket_params.level: 1 would change the experiment" in other.err
    # Another run in its place: same level, other weights and masks.
    record = killed.path / "artifacts" / "environment.json"
    entries = json.loads(record.read_text())
    entries[0]["ticket"]["sha256"] = "0" * 64
    record.write_text(json.dumps(entries))
    swapped = fork("mine", resume=True, status=2, **{**BRANCH, **moved})
    assert "holds other masks or weights than the run being resumed began with" in swapped.last_line
    entries[0]["ticket"]["sha256"] = saved_ticket_digest(fork, moved)
    record.write_text(json.dumps(entries))
    whole = fork("whole", **{**BRANCH, **moved})
    fork("mine", resume=True, **{**BRANCH, **moved}).assert_same_figures(whole)


def saved_ticket_digest(fork, moved) -> str:
    return saved_ticket(fork("digest", **{**BRANCH, **moved}).path)["sha256"]


def test_a_resume_with_another_source_is_refused(fork, source):
    """One that is not there is named in a note, and not read."""
    with_source(source, fork.folder)
    fork("mine", status=143, trap=StopAt(2), **BRANCH)
    other = fork("other", **{**SOURCE, "experiment_params.seed": 3}).path
    refused = fork("mine", resume=True, status=2, **{**BRANCH, "ticket_params.source": str(other)})
    assert "holds other masks or weights than the run being resumed began with" in refused.last_line
    (fork.folder / "source").rename(fork.folder / "elsewhere")
    gone = fork("mine", resume=True, **{**BRANCH, "ticket_params.source": "nowhere"})
    assert "ticket_params.source: nowhere is not there, and is not read: the run began with " in gone.err


def test_a_level_started_again_needs_no_source(fork, source):
    with_source(source, fork.folder)
    fork("mine", **BRANCH)
    shutil.rmtree(fork.folder / "source")
    (fork.folder / "mine" / "artifacts" / "state.json").unlink()  # as if no state were left
    run = fork("mine", resume=True, **BRANCH, **{"experiment_params.resume_level": 1})
    assert list(run.csv("summary")["level"]) == [0, 1]


def test_a_resume_neither_drops_nor_adds_a_source(fork, source):
    with_source(source, fork.folder)
    fork("mine", status=143, trap=StopAt(2), **BRANCH)
    none = {**SHORT, "ticket_params.weights": "reinit"}
    assert "ticket_params.source: '' would change the experiment" in fork("mine", resume=True, status=2, **none).err


@pytest.mark.slow
@pytest.mark.parametrize("options", [BRANCH, REWOUND], ids=["reinit", "rewind"])
def test_a_branch_killed_and_resumed_20_times_is_the_same(fork, source, options):
    with_source(source, fork.folder)
    options = {**options, "prune_params.num_levels": 5, "experiment_params.epochs_per_level": 4}
    whole, rng = fork("whole", **options), random.Random(0)
    kills = 0
    while kills < 20:
        killed = fork.start("mine", resume=begun(fork.folder / "mine"), trap=DieAt(rng.randint(8, 30)), **options)
        status = killed.finish(None).status
        assert status == -signal.SIGKILL, f"ended after {kills} kills with {status}: {killed.output()}"
        kills += 1
    fork("mine", resume=True, **options).assert_same_figures(whole)


# --- bad input -------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("hello",))


def spoil(folder: Path) -> None:
    """Sources that are unfit, beside a good one, `source`."""
    for name in ("damaged", "broken", "no_init"):
        shutil.copytree(folder / "source", folder / name)
    init = folder / "damaged" / "checkpoints" / "model_init.pt"
    init.write_bytes(init.read_bytes()[:1000])
    (folder / "broken" / "expt_config.yaml").write_text("optimizer: {lr: fast}\n")
    (folder / "no_init" / "checkpoints" / "model_init.pt").unlink()
    shutil.copytree(folder / "source", folder / "lrr", ignore=shutil.ignore_patterns("*rewind*"))
    (folder / "empty").mkdir()
    torch.save({"fc1.weight": torch.zeros(3, 3), "code": Evil()}, folder / "evil.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"fc1.weight": torch.zeros(3, 3)}, folder / "small.pt")
    (folder / "text.pt").write_text("hello")
    state = torch.load(folder / "source" / "checkpoints" / "model_level_1.pt", weights_only=True)
    torch.save(state, folder / "good.pt")


OURS, REWIND = {"source": "source"}, {"weights": "rewind"}
BAD = {  # options below ticket_params unless they have a dot; exit status; what the one line must hold
    "missing": ({"source": "nowhere"}, 2, "ticket_params.source: nowhere: no run and no file at"),
    "no run": ({"source": "empty"}, 2, "has no expt_config.yaml"),
    "config of the source": ({"source": "broken"}, 2, "expt_config.yaml: optimizer.lr"),
    "unfinished": ({**OURS, "level": 3}, 2, "has finished levels 0 to 2"),
    "level below -1": ({**OURS, "level": -2}, 2, "ticket_params.level"),
    "another network": ({**OURS, "model_params.model_name": "conv2"}, 2, "holds another network"),
    "no rewind point": ({"source": "lrr", **REWIND}, 2, "has no rewind point: it needs training_type wr"),
    "no such step": ({**OURS, **REWIND, "step": 1}, 2, "has no state of step 1: it needs 1 in"),
    "rewind past the end": (
        {**OURS, **REWIND, "experiment_params.epochs_per_level": 1, "optimizer.warmup_epochs": 0}, 2,
        "experiment_params.epochs_per_level: 1 is not allowed: level 0 begins at step 3",
    ),
    "rewinding behind the start": (
        {**OURS, **REWIND, "experiment_params.training_type": "wr",
         "prune_params.rewind_step": 2, "prune_params.num_levels": 2}, 2,
        "prune_params.rewind_step: 2 is not allowed: level 0 begins at step 3",
    ),
    "another batch": ({**OURS, **REWIND, "dataset.batch_size": 400}, 2, "dataset.batch_size: 400"),
    "another optimizer": ({**OURS, **REWIND, "optimizer.optimizer_name": "adam"}, 2, "optimizer_name: 'adam' is not"),
    "another momentum": ({**OURS, **REWIND, "optimizer.momentum": 0.5}, 2, "optimizer.momentum"),
    "rewinding to another place": (
        {**OURS, **REWIND, "prune_params.num_levels": 2}, 2, "rewind is not allowed with experiment_params.tr"),
    "nothing taken": ({**OURS, "mask": "none", "weights": "reinit"}, 2, "takes anything from it: leave it out"),
    "steps before the start": (
        {**OURS, **REWIND, "prune_params.save_steps": "2,4"}, 2,
        "prune_params.save_steps: [2, 4] is not allowed: none before 3: level 0 begins at step 3"),
    "rewind point before the start": (
        {**OURS, **REWIND, "experiment_params.training_type": "wr", "prune_params.rewind_step": 2}, 2,
        "prune_params.rewind_step: 2 is not allowed: at least step 3"),
    "mask beside er_method": (
        {**OURS, "prune_params.er_method": "snip", "prune_params.er_init": 0.5}, 2,
        "ticket_params.mask: same is not allowed: only none with prune_params.er_method",
    ),
    "shuffle beside er_method": (
        {**OURS, "mask": "shuffle_layer", "prune_params.er_method": "snip", "prune_params.er_init": 0.5}, 2,
        "ticket_params.mask"),
    "shuffled final weights": ({**OURS, "mask": "shuffle_layer", "weights": "final"}, 2, "ticket_params.weights"),
    "final signs of a dense network": ({**OURS, "mask": "none", "weights": "final_signs"}, 2, "final_signs"),
    "init of a file": ({"source": "good.pt", "weights": "init"}, 2, "init needs a run"),
    "level of a file": ({"source": "good.pt", "level": 1}, 2, "which has no levels"),
    "file of another network": ({"source": "small.pt"}, 2, "fc1.weight is (3, 3) in it and (300, 64) in"),
    "excluded layer": ({"source": "good.pt", "prune_params.exclude": "fc3"}, 2, "fc3.weight_mask is not in the"),
    "code": ({"source": "evil.pt"}, 1, "holds more than tensors"),
    "list": ({"source": "list.pt"}, 1, "holds no weights"),
    "text": ({"source": "text.pt"}, 1, "text.pt"),
    "truncated": ({"source": "damaged"}, 1, "model_init.pt was changed since this run wrote it"),
    "checkpoint gone": ({"source": "no_init"}, 1, "model_init.pt is missing"),
    "unknown mask": ({**OURS, "mask": "shuffled"}, 2, "ticket_params.mask"),
    "unknown weights": ({**OURS, "weights": "initial"}, 2, "ticket_params.weights"),
}  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(forks, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(source.path, folder / "source")
    spoil(folder)
    return folder


@pytest.fixture
def signals_as_they_were():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_ticket_is_one_line_and_creates_nothing(case, spoilt, capsys, signals_as_they_were):
    ticket, status, line = BAD[case]
    options = {**SMALL, **SHORT, "prune_params.num_levels": 1, "experiment_params.base_dir": spoilt}
    options |= {key if "." in key else f"ticket_params.{key}": value for key, value in ticket.items()}
    if str(ticket["source"]).endswith(".pt"):
        options["ticket_params.source"] = spoilt / ticket["source"]
    before = sorted(spoilt.iterdir())
    assert harness.main([f"--{key}={value}" for key, value in options.items()]) == status
    out, err = capsys.readouterr()
    faults = [told for told in err.splitlines() if not told.startswith("harness: note: ")]
    assert out == "" and len(faults) == 1 and line in faults[0], err
    assert sorted(spoilt.iterdir()) == before


def test_a_fault_of_a_ticket_is_told_once_by_two_processes(forks, source):
    missing = {**BRANCH, "ticket_params.source": str(source.path / "checkpoints" / "model_init.pt")}
    done = forks("bad", status=2, **{**missing, "prune_params.exclude": "fc1", "dist_params.nproc": 2})
    faults = [line for line in done.err.splitlines() if "note:" not in line]
    assert len(faults) == 1 and "fc1.weight_mask is not in the network" in faults[0]
    assert not done.path.exists()


def test_a_ticket_without_a_source_is_told(forks):
    done = forks("fresh", **ONE_LEVEL, **{"ticket_params.mask": "shuffle_layer", "ticket_params.step": 3})
    for key in ("mask", "step"):
        assert f"ticket_params.{key}: " in done.err and 'source is "": level 0 starts from a fresh network' in done.err
    assert saved_ticket(done.path) is None
