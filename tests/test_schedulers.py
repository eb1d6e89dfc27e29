"""Schedules against tables worked by hand: rates of single steps, in units of the peak."""

import math

import pytest

from utils.schedulers import SCHEDULES, Timeline, learning_rate

# 10 epochs of 4 steps: 40 steps.
TEN = Timeline(epochs=10, steps_per_epoch=4)
WARM = Timeline(epochs=10, steps_per_epoch=4, warmup_epochs=2)


@pytest.mark.parametrize(
    ("name", "line", "table"),
    [
        ("Constant", TEN, {0: 1, 39: 1}),
        ("Constant", WARM, {0: 1 / 8, 3: 4 / 8, 7: 1, 8: 1, 39: 1}),
        # 1/2 and 3/4 of 40 steps are steps 20 and 30
        ("MultiStepLRWarmup", TEN, {0: 1, 19: 1, 20: 0.1, 29: 0.1, 30: 0.01, 39: 0.01}),
        ("MultiStepLRWarmup", WARM, {0: 0.125, 1: 0.25, 7: 1, 8: 1, 20: 0.1, 30: 0.01}),
        # 30, 60, 80 of 90 epochs
        ("ImageNetLRDropsWarmup", Timeline(90, 1), {0: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 79: 0.01, 80: 0.001}),
        ("ImageNetLRDropsWarmup", Timeline(90, 2, 10), {0: 0.05, 19: 1, 59: 1, 60: 0.1, 160: 0.001}),
        # epochs 3 and 6.5; fractions 0.3 and 0.65 say the same
        ("MultiStepLRWarmup", Timeline(10, 4, 0, (3, 6.5)), {11: 1, 12: 0.1, 25: 0.1, 26: 0.01}),
        ("MultiStepLRWarmup", Timeline(10, 4, 0, (0.3, 0.65), 0.5), {11: 1, 12: 0.5, 25: 0.5, 26: 0.25}),
        # linear from 1 at step 0 to the floor at the last of 41 steps
        ("LinearLRWarmup", Timeline(41, 1, floor=0.2), {0: 1, 10: 0.8, 20: 0.6, 40: 0.2}),
        ("LinearLRWarmup", Timeline(11, 4, 1), {0: 0.25, 3: 1, 4: 1, 43: 0}),
        ("CosineLRWarmup", Timeline(41, 1), {0: 1, 10: (1 + math.sqrt(0.5)) / 2, 20: 0.5, 40: 0}),
        ("CosineLRWarmup", Timeline(41, 1, floor=0.1), {20: 0.55, 40: 0.1}),
        # up over a fifth of 20 epochs (8 of 40 steps), down to 0 at the last
        ("TriangularSchedule", Timeline(20, 2), {0: 1 / 8, 7: 1, 8: 1, 39: 0, 24: 1 - 16 / 31}),
        ("TriangularSchedule", Timeline(10, 4, 5), {0: 1 / 20, 19: 1, 39: 0}),
    ],
)
def test_by_hand(name, line, table):
    for step, factor in table.items():
        assert learning_rate(name, 0.4, step, line) == pytest.approx(0.4 * factor, abs=1e-12), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_step_of_a_warmup_is_at_the_warmups_rate(name):
    assert learning_rate(name, 1.0, 0, WARM) == 1 / 8


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_least_warmup_is_one_step(name):
    """None at all would mean another thing to the triangle: its own warm-up, of a fifth."""
    line = Timeline(epochs=2, steps_per_epoch=12, warmup_epochs=0.01)
    assert line.warmup_steps == 1
    assert learning_rate(name, 1.0, 0, line) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_pure_positive_and_never_above_the_peak(name):
    rates = [learning_rate(name, 0.3, step, WARM) for step in range(WARM.steps)]
    assert rates == [learning_rate(name, 0.3, step, WARM) for step in range(WARM.steps)]
    assert max(rates) == pytest.approx(0.3) and min(rates) >= 0
    after = rates[WARM.warmup_steps :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("fraction", [1 / 3, 2 / 3, 0.1, 0.7])
def test_fractions_fall_on_whole_epochs_whatever_their_rounding(fraction):
    line = Timeline(epochs=30, steps_per_epoch=391, milestones=(fraction,))
    assert line.milestone_steps(()) == [round(fraction * 30) * 391]


def test_errors():
    with pytest.raises(ValueError, match=r"optimizer.scheduler_type: 'Cosine' is not one of MultiStepLRWarmup"):
        learning_rate("Cosine", 1.0, 0, TEN)
    with pytest.raises(ValueError, match="step 40 lies outside"):
        learning_rate("Constant", 1.0, 40, TEN)
