"""How long a run still takes: from its config and its rows, against tables worked by hand, and by its properties."""

import csv
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_params import make_config
from utils.runs.remaining import first_epochs, read_progress, seconds_left, seconds_per_epoch, total_epochs
from utils.runs.tables import EPOCH_COLUMNS, SUMMARY, SUMMARY_COLUMNS, epoch_table, table_file


def config(levels: int = 4, epochs: int = 10, kind: str = "imp", **prune_params):
    return make_config(
        {
            "prune_params": {"num_levels": levels, **prune_params},
            "experiment_params": {"epochs_per_level": epochs, "training_type": kind},
            "optimizer": {"warmup_epochs": 0},
        }
    )


def finished(*levels: tuple[int, float]) -> list[dict]:
    """Rows of the summary. Args: (epochs, seconds) of each level."""
    return [{"level": n, "epochs": epochs, "seconds": seconds} for n, (epochs, seconds) in enumerate(levels)]


def trained(*seconds: float, first: int = 0) -> list[dict]:
    """Rows of a level's epochs."""
    return [{"epoch": first + n, "seconds": value} for n, value in enumerate(seconds)]


LEVEL = (10, 20.0)  # 2 s per epoch
WR = {"kind": "wr", "rewind_epoch": 3}
TABLE = [
    # config, finished levels, rows of the level in progress, more -> seconds by hand
    (config(), [], [], {}, math.nan),
    (config(), [], [], {"done": 0.5, "epoch_seconds": 4.0}, 39.5 * 4),
    (config(), [], trained(30), {}, 39 * 30),
    (config(), [], trained(30, 2), {}, 38 * 2),  # the first epoch compiles
    (config(), [], trained(30, 2, 4), {}, 37 * 3),
    (config(), [LEVEL], [], {}, 30 * 2),
    (config(), [LEVEL], [], {"level_change": 5.0}, 30 * 2 + 2 * 5),
    (config(), [LEVEL], trained(4, 4), {}, 28 * 28 / 12),
    (config(), [(10, 90.0), LEVEL], trained(2, 2), {}, 18 * 2),  # level 0 ran on a slower machine
    (config(), [LEVEL] * 3, trained(*[2] * 9), {"level_change": 5.0}, 2),
    (config(), [LEVEL] * 3, trained(*[2] * 9), {"done": 1.0}, 0),
    (config(), [LEVEL] * 4, [], {"level_change": 5.0}, 0),
    (config(), [LEVEL] * 5, [], {}, 0),  # more levels than asked for now
    (config(**WR), [], trained(2, 2), {}, (8 + 3 * 7) * 2),
    (config(**WR), [LEVEL], trained(2, first=3), {}, (6 + 2 * 7) * 2),
    (config(kind="wr", rewind_step=35), [LEVEL], [], {}, 3 * 10 * 2),  # the most that it can be
    (config(kind="wr", rewind_step=35), [LEVEL], [], {"known": (0, 4)}, 3 * 6 * 2),
    (config(kind="wr", rewind_step=35), [LEVEL], trained(2, first=4), {}, (5 + 2 * 6) * 2),
    (config(kind="wr", rewind_step=35), [LEVEL, (6, 12.0)], [], {}, 2 * 6 * 2),
    (config(), [], [], {"known": (6, 0), "epoch_seconds": 2.0}, (4 + 3 * 10) * 2),  # a ticket of a rewind point
    (config(), [], trained(5, 2, first=6), {}, (2 + 3 * 10) * 2),
    (config(kind="lrr", rewind_epoch=3), [LEVEL], [], {"known": (0, 4)}, 30 * 2),  # only wr rewinds the schedule
]


@pytest.mark.parametrize(("cfg", "levels", "epochs", "more", "expected"), TABLE)
def test_a_table_worked_by_hand(cfg, levels, epochs, more, expected):
    levels = levels if levels and isinstance(levels[0], dict) else finished(*levels)
    assert seconds_left(cfg, levels, epochs, **more) == pytest.approx(expected, nan_ok=True)
    text = [[{key: str(value) for key, value in row.items()} for row in rows] for rows in (levels, epochs)]
    assert seconds_left(cfg, *text, **more) == pytest.approx(expected, nan_ok=True), "as a CSV has it"


@given(
    st.integers(1, 6),
    st.integers(2, 8),
    st.sampled_from(["imp", "wr", "lrr"]),
    st.integers(0, 6),
    st.floats(1e-3, 1e5),
    st.data(),
)
def test_a_run_of_even_epochs_is_told_exactly_at_any_moment(count, per_level, kind, rewind, seconds, data):
    """Also right after a resume: only the rows count. The time left falls by an epoch's with each one."""
    rewind = 1 + rewind % (per_level - 1)
    cfg = config(count, per_level, kind, rewind_epoch=rewind)
    begins = [0, *[rewind if kind == "wr" else 0] * (count - 1)]
    place = [(level, epoch) for level in range(count) for epoch in range(begins[level], per_level)]
    at = data.draw(st.integers(1, len(place)))
    level, epoch = place[at] if at < len(place) else (count, 0)
    levels = finished(*((per_level - begins[n], (per_level - begins[n]) * seconds) for n in range(level)))
    epochs = trained(*[seconds] * (epoch - begins[level]), first=begins[level]) if level < count else []
    assert total_epochs(cfg, levels, epochs) == len(place)
    assert first_epochs(cfg, levels, epochs) == (0, rewind if kind == "wr" else 0)
    assert seconds_per_epoch(levels, epochs) == pytest.approx(seconds)
    assert seconds_left(cfg, levels, epochs) == pytest.approx((len(place) - at) * seconds)


def test_a_directory_of_a_run(tmp_path):
    """Its CSVs as any run writes them, read without torch."""
    cfg = config()

    def write(table: str, columns: list[str], rows: list[dict]) -> None:
        file = table_file(tmp_path, table)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="1")
            writer.writeheader()
            writer.writerows(rows)

    assert math.isnan(read_progress(tmp_path, cfg).seconds_left)
    write(SUMMARY, SUMMARY_COLUMNS, finished(LEVEL))
    write(epoch_table(1), EPOCH_COLUMNS, trained(2, 2))
    found = read_progress(tmp_path, cfg)
    assert (found.levels, found.epochs, found.total) == (1, 12, 40)
    assert found.seconds_left == pytest.approx(56)
    assert read_progress(tmp_path, config(levels=1)).seconds_left == 0
