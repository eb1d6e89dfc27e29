"""What a person sees while a run trains: a line that changes in a terminal; lines in a log. Rank 0 alone shows it.

The device is never asked: progress is that of the steps launched, and figures are those that the tables hold anyway.
"""

import math
import sys
import time
from collections import deque
from typing import TextIO

from harness_params import Config
from utils.output import is_terminal, write_line
from utils.runs.remaining import epochs_trained, seconds_left, total_epochs
from utils.runs.run import Run
from utils.runs.states import Position
from utils.runs.tables import SUMMARY, Row, epoch_table
from utils.status_lines import StatusLines, bar_line, clock, room_for_line
from utils.wording import density_text

DRAW_SECONDS = 0.25  # between two drawings in a terminal
LINE_SECONDS = 60.0  # between two lines within a level, without a terminal


class Progress:
    """Shows where a run stands, and how long it still takes. In a `with` block; outside of it, it shows nothing.

    Args:
        position: of the run.
        run: None where nothing is to be shown.
        steps: per epoch.
        known: as `utils.runs.remaining.first_epochs`.
        stream: where it is shown; None = sys.stdout.
    """

    def __init__(
        self,
        cfg: Config,
        position: Position,
        run: Run | None,
        steps: int,
        known: tuple[int, int] = (0, 0),
        stream: TextIO | None = None,
    ):
        self.cfg, self.position, self.run, self.steps, self.known = cfg, position, run, steps, known
        self.stream = stream or sys.stdout
        self.terminal = is_terminal(self.stream)
        self.lines = StatusLines(self.stream)
        self.due = math.inf  # when it is looked at next; time.monotonic()
        self.line_due = math.inf  # without a terminal: when the next line within a level is
        self.own: list[float] = []  # seconds of each epoch that this process has trained
        self.marks: deque[tuple[float, int]] = deque()  # (when, steps launched) of the epoch in progress
        self.first = 0  # step at which that epoch began here
        self.ended = self.level_change = 0.0  # when the last epoch ended; seconds from there to the next level's start
        self.figures: dict[str, float] = {}  # the last of each column

    def __enter__(self) -> "Progress":
        if self.run:
            self.due, self.line_due = 0.0, time.monotonic() + LINE_SECONDS
            if self.terminal:
                self.lines.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.due = math.inf
        if self.run and self.terminal:
            self.lines.__exit__()

    # --- what happens --------------------------------------------------------------------------------------------

    def step(self) -> None:
        """A step was launched."""
        if time.monotonic() >= self.due:
            self._look()

    def prune(self) -> None:
        """A level is being pruned."""
        if self.terminal and self.due < math.inf:
            self.show()

    def begin_level(self) -> None:
        """A level's training begins, or goes on."""
        if self.ended:
            self.level_change = time.monotonic() - self.ended
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """The steps of an epoch begin."""
        self.marks.clear()
        self.first = self.position.step

    def end_epoch(self, row: Row) -> None:
        """An epoch has ended. Args: row: of its table."""
        self.own.append(row["seconds"])
        self.figures |= {key: value for key, value in row.items() if not math.isnan(value)}
        self.ended = time.monotonic()
        self.begin_epoch()
        self.step()

    def end_level(self, row: Row) -> None:
        """A level has ended: a line that stays. Args: row: of the summary."""
        if self.due == math.inf:
            return
        accuracy = f"accuracy {row['final_test_acc']:.2f}%, best {row['max_test_acc']:.2f}%"
        density = density_text(row["density"])
        self._say(f"level {row['level']}: density {density}, {accuracy}, {_seconds(row['seconds'])}")

    # --- how it is shown -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Notes how far the epoch is, and shows it if a line is due."""
        now, step = time.monotonic(), self.position.step
        self.due = now + DRAW_SECONDS
        if step > (self.marks[-1][1] if self.marks else self.first):
            self.marks.append((now, step))
        if self.terminal or now >= self.line_due:
            self.show()

    def show(self) -> None:
        """Draws the line of a terminal; without one, prints a line."""
        if self.terminal:
            self.lines.show([self._line(room_for_line(self.stream))])
        else:
            place, share, left, figures = self._parts()
            self._say(f"{place}, {share.strip()} of all, {left}{figures and ', '}{figures}")

    def _say(self, line: str) -> None:
        """A line that stays."""
        write_line(line, self.stream)
        self.line_due = time.monotonic() + LINE_SECONDS

    def _parts(self) -> tuple[str, str, str, str]:
        """Where the run stands, how far that is, how long it still takes, and the last figures."""
        position, epochs = self.position, self.cfg.experiment_params.epochs_per_level
        share = position.step / self.steps
        place = f"level {position.level}/{self.cfg.prune_params.num_levels - 1}"
        place += f" epoch {min(position.epoch + 1, epochs)}/{epochs} {share:4.0%}" if position.begun else " pruning"
        left = self.seconds_left()
        names = {"train_loss": "loss {:.4f}", "test_acc": "accuracy {:.2f}%", "images_per_second": "{:,.0f} images/s"}
        figures = [text.format(self.figures[key]) for key, text in names.items() if key in self.figures]
        return place, f"{self.share():4.0%}", f"{clock(left)} left", ", ".join(figures)

    def _line(self, columns: int) -> str:
        place, share, left, figures = self._parts()
        richer = [f"{share} {left}, {figures}"] if figures else []
        return bar_line(place, self.share(), [*richer, f"{share} {left}", left], columns, self.stream)

    # --- how far, how long ---------------------------------------------------------------------------------------

    def _rows(self) -> tuple[list[Row], list[Row]]:
        assert self.run
        return self.run.tables[SUMMARY], self.run.tables[epoch_table(self.position.level)]

    def share(self) -> float:
        """Of all the run's epochs, those that are done, 0 to 1."""
        rows = self._rows()
        done = epochs_trained(*rows) + self.position.step / self.steps
        return min(1.0, done / total_epochs(self.cfg, *rows, self.known))

    def seconds_left(self) -> float:
        """See `utils.runs.remaining`: by the epochs of this process, by the rows, or by the steps of this epoch."""
        levels, epochs = self._rows()
        return seconds_left(
            self.cfg, levels, epochs, done=self.position.step / self.steps,
            epoch_seconds=self._epoch_seconds(bool(levels or epochs)), level_change=self.level_change, known=self.known,
        )  # fmt: skip

    def _epoch_seconds(self, measured: bool) -> float:
        if len(self.own) > 1:  # the first one compiles and captures
            recent = self.own[1:][-self.cfg.experiment_params.epochs_per_level :]
            return sum(recent) / len(recent)
        return math.nan if measured else self._by_steps()

    def _by_steps(self) -> float:
        """Seconds per epoch by the later half of the steps launched: the first ones compile and capture."""
        while len(self.marks) > 2 and 2 * self.marks[1][1] <= self.position.step + self.first:
            self.marks.popleft()
        if len(self.marks) < 2:
            return math.nan
        (begin, first), (end, last) = self.marks[0], self.marks[-1]
        return (end - begin) / (last - first) * self.steps


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"
