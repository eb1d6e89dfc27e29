"""What a person sees while a run trains, in a terminal and in a log: by whole runs, and by the lines alone."""

import io
import math
import re
import signal
import sys
import time
import types

import pytest
import torch

from harness_params import make_config
from tests.terminal import Shown, Terminal
from tests.test_signals import ENDLESS, HINT, STUCK
from tests.traps import KINDS, SHORT, MustBeMet
from utils.output import is_terminal
from utils.runs.progress import Progress
from utils.runs.run import Run
from utils.runs.states import Position
from utils.runs.tables import SUMMARY, epoch_table
from utils.status_lines import StatusLines, bar_line, clock
from utils.training.tally import Tally

FINISHED = re.compile(r"level (\d): density ([\d.]+), accuracy \d+\.\d\d%, best \d+\.\d\d%, [\d.,]+ s")
UNDER_WAY = re.compile(r"level (\d)/(\d) epoch (\d+)/(\d+) +\d+%")


@pytest.fixture
def terminal():
    made = Terminal(100)
    yield made
    made.close()


def finish(run, terminal: Terminal, status: int = 0) -> list[str]:
    """Waits for the run's end; returns what is on the screen then."""
    end = time.monotonic() + 120
    while run.process.exitcode is None and time.monotonic() < end:
        terminal.read()
        run.process.join(0.02)
    run.finish(status)
    terminal.read()
    return terminal.screen.text


# --- whole runs in a terminal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [1, 2])
def test_levels_stay_and_the_line_goes(fork, terminal, nproc):
    """Whatever is printed in between is whole and in its place. Of two processes one shows."""
    options = {**KINDS["imp"], "dist_params.nproc": nproc}
    said = nproc == 1
    screen = finish(fork.start("run", trap=Shown(terminal.name, said=said), **options), terminal)
    assert screen[0].startswith(f"run in {fork.folder}: ") and screen[1].startswith("masks on ")
    stay = [line for line in screen if FINISHED.fullmatch(line)]
    assert [FINISHED.match(line)[1] for line in stay] == ["0", "1", "2"]
    between = screen[2 : screen.index(stay[-1])]
    told = [line for line in between if line not in stay and not line.startswith("  warnings.warn")]
    expected = [f"{kind} {level} {epoch}" for level in range(3) for epoch in range(3) for kind in ("note", "w", "log")]
    told = [re.sub(r"^.*UserWarning: warning (.*) \(terminal\.py:\d+\)$", r"w \1", line) for line in told]
    assert told == (expected if said else [])
    after = screen[screen.index(stay[-1]) + 1 :]
    assert after[0] == str(fork.folder / "run") and len(after) == 5, "the table of the levels, and nothing else"
    if said:  # each made room for by a line that stood there
        drawn = {match.groups() for match in UNDER_WAY.finditer(terminal.screen.fed)}
        assert drawn and {(last, epochs) for _, last, _, epochs in drawn} == {("2", "3")}


def test_a_window_made_narrower_and_wider_and_a_stop(fork, terminal):
    """While a run is trained; the stop's line comes last, and the resumed run counts what is left."""
    run = fork.start("run", trap=Shown(terminal.name), **ENDLESS)
    for columns in (100, 60, 80, 40, 120):
        terminal.resize(columns)
        seen = len(terminal.screen.fed)
        run.wait_for(lambda seen=seen: terminal.read() or terminal.screen.fed[seen:].count("level 0/2") > 2)
        *opening, line = terminal.screen.text
        assert len(opening) == 2 and len(line) < columns - 1
        if columns == 40:
            assert re.fullmatch(r"[\d:]+ left, level 0/2 epoch \d.*", line)
        else:
            assert UNDER_WAY.match(line) and line.endswith("images/s" if columns == 120 else "left")
    last = line
    terminal.resize(50)
    run.kill(signal.SIGINT)
    *opening, line = finish(run, terminal, 130)
    assert len(opening) == 2 and line == f"harness: stopped by SIGINT; {HINT}{fork.folder / 'run'}"

    second = Terminal(100)
    again = fork.start("run", resume=True, trap=Shown(second.name), **ENDLESS)
    again.wait_for(lambda: second.read() or len({drawn[3] for drawn in UNDER_WAY.finditer(second.screen.fed)}) > 1)
    again.kill(signal.SIGTERM)
    finish(again, second, 143)
    first = UNDER_WAY.search(second.screen.fed)
    assert int(first[3]) >= int(UNDER_WAY.match(last)[3]) and int(first[3]) > 1
    assert re.search(r"epoch \d+/100000 .* \d+:\d\d(:\d\d)? left", second.screen.fed), "measured before the stop"
    second.close()


def test_the_end_by_a_fault(fork, terminal):
    hot = {"optimizer.lr": "1e30", "optimizer.warmup_epochs": 0}
    *_, last = finish(fork.start("run", trap=Shown(terminal.name), **{**KINDS["imp"], **hot}), terminal, 1)
    assert last.startswith("harness: training loss is ")


def test_a_second_signal_leaves_no_line_behind(fork, terminal):
    """It ends the process at once, in the middle of a pruning that takes minutes."""
    run = fork.start("run", trap=Shown(terminal.name), **{**SHORT, **STUCK, "dist_params.nproc": 2})
    run.wait_for(lambda: terminal.read() or "level 0/1 pruning" in terminal.screen.fed)
    run.kill(signal.SIGINT)
    run.process.join(1)
    assert run.process.exitcode is None
    run.kill(signal.SIGINT)
    opening, masks = finish(run, terminal, 130)
    assert opening.startswith("run in ") and masks.startswith("masks on ")


# --- a log -----------------------------------------------------------------------------------------------------------


class OftenALine(MustBeMet):
    """Lines within a level are due twice a second instead of once a minute."""

    def lay(self) -> None:
        from utils.runs import progress

        progress.LINE_SECONDS, plain = 0.5, Progress.show

        def show(shown) -> None:
            self.met()
            plain(shown)

        Progress.show = show


def test_a_log_has_a_line_per_level_at_once(fork):
    run = fork.start("run", **{**KINDS["imp"], "prune_params.num_levels": 200, "prune_params.prune_rate": 0.02})
    run.wait_for(lambda: FINISHED.findall(run.logs[0].read_text() if run.logs[0].exists() else "")[1:])
    run.kill(signal.SIGTERM)
    opening, masks, *levels = run.finish(143).out.splitlines()
    assert opening.startswith(f"run in {fork.folder}: ") and masks.startswith("masks on ")
    assert all(map(FINISHED.fullmatch, levels)), "none within a level, which takes less than a minute"
    assert [int(FINISHED.match(line)[1]) for line in levels if len(line) < 99][:9] == [*range(min(9, len(levels)))]


def test_a_log_of_a_long_level(fork):
    begin = time.monotonic()
    run = fork.start("run", trap=OftenALine(), **ENDLESS)
    run.wait_for(lambda: len(run.output().splitlines()) > 4)
    run.kill(signal.SIGTERM)
    _, _, *lines = run.finish(143).out.splitlines()
    assert len(lines) <= (time.monotonic() - begin) / 0.5
    assert all(re.fullmatch(r"level 0/2 epoch \d+/100000 +\d+%, 0% of all, .* left(, .*)?", line) for line in lines)
    assert "\r" not in "".join(lines) and "\x1b" not in "".join(lines)


# --- the lines alone -------------------------------------------------------------------------------------------------


def test_a_line_finds_what_room_there_is():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    blocks = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    after = ["50% 1:00 left, loss 0.1", "50% 1:00 left", "1:00 left"]
    assert bar_line("level 1", 0.5, after, 42, ascii_only) == "level 1 |####----| 50% 1:00 left, loss 0.1".replace(
        "-", " "
    )
    assert bar_line("level 1", 0.5, after, 39, ascii_only) == "level 1 |#######5       | 50% 1:00 left"
    assert bar_line("level 1", 0.25, after, 34, blocks) == "level 1 |██▌       | 50% 1:00 left"
    assert bar_line("level 1", 0.25, after, 27, blocks) == "level 1 |█▊     | 1:00 left"
    assert bar_line("level 1", 0.25, after, 20, blocks) == "level 1, 1:00 left"
    assert bar_line("level 1", 0.25, after, 17, blocks) == "1:00 left, level 1"
    for columns in range(26, 80):
        assert len(bar_line("level 1", 0.3, after, columns, blocks)) == columns
    assert [clock(seconds) for seconds in (0, 59.2, 3661, math.nan)] == ["00:00", "01:00", "1:01:01", "?"]


def test_lines_of_a_closed_or_plain_stream(tmp_path):
    with open(tmp_path / "log", "w") as file:
        assert not is_terminal(file)
    assert not is_terminal(file) and not is_terminal(None)


def test_several_lines_in_a_terminal_that_shrinks(terminal, monkeypatch):
    """And what is printed without an end of line is gone on with."""
    with open(terminal.name, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        lines = StatusLines(stream)
        lines.show(["never seen"])
        plain = stream.write
        with lines:
            lines.show(["a" * 90, "b" * 200, "c"])
            terminal.read()
            assert terminal.screen.text == ["a" * 90, "b" * 95, "c"]
            print("stays", end="")
            lines.show(["not in the middle of a line"])
            print(", whole")
            lines.show(["a" * 90, "b" * 200, "c"])
            terminal.resize(30)
            print("too")
            terminal.read()
            assert terminal.screen.text == ["stays, whole", "too", "a" * 25, "b" * 25, "c"]
        assert stream.write == plain
        lines.show(["never seen"])
        terminal.read()
        assert terminal.screen.text == ["stays, whole", "too"] and "never" not in terminal.screen.fed


def test_progress_asks_the_device_for_nothing(terminal, tmp_path, monkeypatch):
    """Its tensors have no values to give, here; and the time left is known within the first epoch."""
    cfg = make_config({"prune_params": {"num_levels": 2}, "experiment_params": {"epochs_per_level": 12}})
    meta = torch.zeros(100, device="meta")
    position = Position(begun=True, tally=Tally(meta, meta.sum()))
    run = Run(tmp_path, cfg)
    run.writer.close()
    now = 0.0  # the clock goes by hand: a loaded machine sleeps longer than it is told to
    monkeypatch.setattr("utils.runs.progress.time", types.SimpleNamespace(monotonic=lambda: now))
    with open(terminal.name, "w", buffering=1) as stream, Progress(cfg, position, run, 100, stream=stream) as shown:
        shown.begin_level()
        for step in range(1, 41):
            position.tally.step, shown.due = step, 0.0
            now += 0.3 if step < 4 else 0.01  # the first steps compile
            shown.step()
        assert shown.seconds_left() == pytest.approx(23.6), "one second per epoch"
        terminal.read()
        assert terminal.screen.text[-1].startswith("level 0/1 epoch 1/12  40% |")
        row = {"epoch": 0, "seconds": 60.0, "train_loss": 0.5, "test_acc": math.nan, "images_per_second": 1234.5}
        run.tables.load_state_dict({epoch_table(0): [row]})
        position.epoch, position.tally, shown.due = 1, None, 0.0
        shown.end_epoch(row)
        assert shown.seconds_left() == pytest.approx(23 * 60)
        terminal.read()
        assert terminal.screen.text[-1].endswith("|   4% 23:00 left, loss 0.5000, 1,234 images/s")
        second = {**row, "epoch": 1, "seconds": 30.0}
        run.tables.load_state_dict({epoch_table(0): [row, second]})
        position.epoch = 2
        shown.end_epoch(second)
        assert shown.seconds_left() == pytest.approx(22 * 30), "the first one compiles"
        run.tables.load_state_dict({SUMMARY: [{"level": 0, "epochs": 12, "seconds": 600.0}]})
        position.level, position.epoch = 1, 0
        assert shown.seconds_left() == pytest.approx(12 * 30), "this process's own epochs, not those of another machine"
