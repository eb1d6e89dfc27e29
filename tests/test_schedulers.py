"""Schedules against tables worked by hand: rates of single steps, in units of the peak."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from utils.schedulers import SCHEDULES, Timeline, learning_rate

# 10 epochs of 4 steps: 40 steps.
TEN = Timeline(epochs=10, steps_per_epoch=4)
WARM = Timeline(epochs=10, steps_per_epoch=4, warmup_epochs=2)
LINEAR_WARMUP = [name for name in SCHEDULES if name != "OneCycleLR"]  # torch's starts at 1/25


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
        # a fifth of 40 steps is 8: at the peak up to step 32, 1/8 at the last
        ("TrapezoidalSchedule", TEN, {0: 1, 31: 1, 32: 1, 33: 7 / 8, 36: 4 / 8, 39: 1 / 8}),
        ("TrapezoidalSchedule", WARM, {0: 1 / 8, 6: 7 / 8, 7: 1, 32: 1, 39: 1 / 8}),
        # 5 epochs of cool-down: 20 steps, from 1 at step 20 towards 0.2 at step 40
        ("TrapezoidalSchedule", Timeline(10, 4, floor=0.2, cooldown_epochs=5), {20: 1, 30: 0.6, 39: 0.24}),
        # up over 0.3 of 40 steps, to step 11: half way at 5.5; down over 28 steps, to 4e-6
        ("OneCycleLR", TEN, {0: 1 / 25, 11: 1, 25: (1 + 4e-6) / 2, 39: 4e-6}),
        ("OneCycleLR", Timeline(10, 4, 2.75, floor=0.5), {0: 0.04, 5: 0.52, 10: 1, 39: 0.5}),
        # two cycles of 20 steps: 8 warm-up steps in each; milestones of a cycle: 1/2 and 3/4 of 20
        ("CosineLRWarmup", Timeline(10, 4, 2, cycles=2), {0: 1 / 8, 7: 1, 8: 1, 19: 0, 20: 1 / 8, 28: 1, 39: 0}),
        ("MultiStepLRWarmup", Timeline(10, 4, cycles=2), {9: 1, 10: 0.1, 15: 0.01, 20: 1, 30: 0.1, 39: 0.01}),
        ("TrapezoidalSchedule", Timeline(10, 4, cycles=2), {16: 1, 19: 1 / 4, 20: 1, 39: 1 / 4}),
    ],
)
def test_by_hand(name, line, table):
    for step, factor in table.items():
        assert learning_rate(name, 0.4, step, line) == pytest.approx(0.4 * factor, abs=1e-12), step


@pytest.mark.filterwarnings("ignore:Detected call")  # no weight is trained here
@pytest.mark.parametrize(("epochs", "per_epoch", "warmup"), [(10, 4, 0), (3, 7, 0), (5, 13, 2), (30, 3, 4), (2, 2, 1)])
def test_one_cycle_is_torchs(epochs, per_epoch, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    share = warmup / epochs if warmup else 0.3
    theirs = OneCycleLR(optimizer, 0.4, epochs=epochs, steps_per_epoch=per_epoch, pct_start=share, cycle_momentum=False)
    line = Timeline(epochs, per_epoch, warmup)
    for step in range(line.steps):
        assert learning_rate("OneCycleLR", 0.4, step, line) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        if step + 1 < line.steps:
            theirs.step()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("cycles", [2, 5])
def test_each_cycle_is_a_level_of_its_own_length(name, cycles):
    line, one = Timeline(10, 3, 0.5, cycles=cycles), Timeline(10 // cycles, 3, 0.5)
    rates = [learning_rate(name, 1.0, step, line) for step in range(line.steps)]
    assert rates == cycles * [learning_rate(name, 1.0, step, one) for step in range(one.steps)]


@pytest.mark.parametrize("name", LINEAR_WARMUP)
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
