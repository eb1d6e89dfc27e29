"""Learning-rate schedules: pure functions of the step.

A schedule maps (step, Timeline) to a factor on the peak rate ``optimizer.lr``. Step 0 is the first optimizer step of a
full level. The rate is set *before* each step, so a warm-up holds from its first step on. A level that starts at epoch
k (weight rewinding) starts at step ``k * steps_per_epoch``.

Warm-up is linear, as in Goyal et al. 2017 (section 2.2): step s of W warm-up steps runs at (s + 1) / W of the peak, so
the last warm-up step is the first step at the peak rate.

A level may be several cycles, equal repeats of its schedule: each restarts the rate, and nothing else (warm restarts,
Loshchilov & Hutter 2017). "The level" below is then one cycle.

A new schedule is one function and one line in `SCHEDULES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from utils.registry import Table


@dataclass(frozen=True)
class Timeline:
    """What a schedule needs to know about its level.

    Attributes:
        epochs: E, epochs of a full level.
        steps_per_epoch: optimizer steps per epoch.
        warmup_epochs: length of the warm-up in epochs, fractions allowed; 0 means none.
        milestones: when step schedules multiply the rate by `gamma`: below 1 a fraction of the level, otherwise an
            epoch; empty means the schedule's own.
        gamma: the factor at each milestone.
        floor: ``lr_min / lr``, the last factor of annealing schedules.
        cooldown_epochs: length of the cool-down of the trapezoid; 0 means a fifth of the level.
        cycles: equal repeats of the schedule in a level; they divide `epochs`.
    """

    epochs: int
    steps_per_epoch: int
    warmup_epochs: float = 0.0
    milestones: Sequence[float] = ()
    gamma: float = 0.1
    floor: float = 0.0
    cooldown_epochs: float = 0.0
    cycles: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps of a full level."""
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up; at least 1 if there is one, because 0 means none."""
        return max(1, round(self.warmup_epochs * self.steps_per_epoch)) if self.warmup_epochs else 0

    @property
    def cooldown_steps(self) -> int:
        """Length of the cool-down, at least 1."""
        return max(1, round((self.cooldown_epochs or OWN_COOLDOWN * self.epochs) * self.steps_per_epoch))

    def cycle(self) -> "Timeline":
        """The timeline of one cycle."""
        return replace(self, epochs=self.epochs // self.cycles, cycles=1)

    def milestone_steps(self, default: Sequence[float]) -> list[int]:
        """The first step after each milestone."""
        places = [float(m) for m in (self.milestones or default)]
        return [math.ceil(round((m * self.epochs if m < 1 else m) * self.steps_per_epoch, 6)) for m in places]


@dataclass(frozen=True)
class Schedule:
    """A line of `SCHEDULES`.

    Attributes:
        factor: factor on the peak rate, of (step, Timeline).
        milestones: it drops at ``optimizer.milestones`` by ``optimizer.gamma``, and has no final rate of its own.
        cooldown: it ends with ``optimizer.cooldown_epochs``.
    """

    factor: Callable[[int, Timeline], float]
    milestones: bool = False
    cooldown: bool = False


# The trapezoid's own cool-down: the last fifth (Hägele et al. 2024, section 3).
OWN_COOLDOWN = 0.2
# Defaults of torch.optim.lr_scheduler.OneCycleLR: its rise, share of the level; first factor; last over first factor.
ONE_CYCLE_RISE, ONE_CYCLE_FIRST, ONE_CYCLE_LAST = 0.3, 1 / 25, 1e-4


def _warmup(step: int, line: Timeline) -> float | None:
    """(step + 1) / W during the warm-up; None after it."""
    return (step + 1) / line.warmup_steps if step < line.warmup_steps else None


def _drops(step: int, line: Timeline, default: Sequence[float]) -> float:
    """Warm-up, and a factor `gamma` at each milestone."""
    factor = line.gamma ** sum(step >= m for m in line.milestone_steps(default))
    ramp = _warmup(step, line)
    return factor if ramp is None else factor * ramp


def _progress(step: int, line: Timeline) -> float:
    """0 at the first step after the warm-up, 1 at the level's last step."""
    span = max(1, line.steps - 1 - line.warmup_steps)
    return min(1.0, max(0.0, (step - line.warmup_steps) / span))


def multi_step(step: int, line: Timeline) -> float:
    """Times gamma at 1/2 and 3/4 of the level: 32k and 48k of 64k steps on CIFAR, He et al. 2016."""
    return _drops(step, line, (0.5, 0.75))


def imagenet_drops(step: int, line: Timeline) -> float:
    """Times gamma at 1/3, 2/3 and 8/9 of the level: epochs 30, 60, 80 of 90, Goyal et al. 2017."""
    return _drops(step, line, (1 / 3, 2 / 3, 8 / 9))


def cosine(step: int, line: Timeline) -> float:
    """Half a cosine from 1 to the floor, reached at the last step (Loshchilov & Hutter 2017, without restarts)."""
    ramp = _warmup(step, line)
    if ramp is not None:
        return ramp
    return line.floor + (1 - line.floor) * 0.5 * (1 + math.cos(math.pi * _progress(step, line)))


def linear(step: int, line: Timeline) -> float:
    """A straight line from 1 to the floor, reached at the last step."""
    ramp = _warmup(step, line)
    return ramp if ramp is not None else 1 - (1 - line.floor) * _progress(step, line)


def triangular(step: int, line: Timeline) -> float:
    """Linear up over the warm-up (a fifth of the level if warmup_epochs is 0), then linear down to the floor."""
    if line.warmup_steps:
        return linear(step, line)
    return linear(step, Timeline(line.epochs, line.steps_per_epoch, 0.2 * line.epochs, floor=line.floor))


def trapezoidal(step: int, line: Timeline) -> float:
    """The peak rate between the warm-up and a linear cool-down to the floor.

    Step s of n runs at (n - s) / C in the C steps of the cool-down: the first of them at the peak, the last at 1 / C;
    step n, after the level, would be at the floor (Jordan 2024, modded-nanogpt; TurboPrune, ``step_trapezoidal``).
    """
    ramp = _warmup(step, line)
    if ramp is not None:
        return ramp
    return line.floor + (1 - line.floor) * min(1.0, (line.steps - step) / line.cooldown_steps)


def one_cycle(step: int, line: Timeline) -> float:
    """Half a cosine up from 1/25 over the warm-up (0.3 of the level if warmup_epochs is 0), then half a cosine down to
    the floor, or to 1/25 of 1e-4 where that is more (Smith & Topin 2018).

    The rates are those of torch's OneCycleLR. The momentum stays as it is: torch's would be cycled between 0.85 and
    0.95, against the rate.
    """
    top = (line.warmup_steps or ONE_CYCLE_RISE * line.steps) - 1  # the place of the peak, a fraction of a step perhaps
    if step <= top:
        return _half_cosine(ONE_CYCLE_FIRST, 1.0, step / top if top > 0 else 1.0)
    last = max(line.floor, ONE_CYCLE_FIRST * ONE_CYCLE_LAST)
    return _half_cosine(1.0, last, (step - top) / (line.steps - 1 - top))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def constant(step: int, line: Timeline) -> float:
    """The peak rate, after the warm-up."""
    ramp = _warmup(step, line)
    return 1.0 if ramp is None else ramp


_LINES = {
    "MultiStepLRWarmup": Schedule(multi_step, milestones=True),
    "ImageNetLRDropsWarmup": Schedule(imagenet_drops, milestones=True),
    "CosineLRWarmup": Schedule(cosine),
    "LinearLRWarmup": Schedule(linear),
    "TriangularSchedule": Schedule(triangular),
    "TrapezoidalSchedule": Schedule(trapezoidal, cooldown=True),
    "OneCycleLR": Schedule(one_cycle),
    "Constant": Schedule(constant),
}
SCHEDULES: Table[Schedule] = Table("schedule", Schedule, _LINES, lambda _, facts: Schedule(constant, **facts))


def with_milestones() -> list[str]:
    """Schedules that drop at ``optimizer.milestones``."""
    return [name for name, schedule in SCHEDULES.items() if schedule.milestones]


def learning_rate(name: str, lr: float, step: int, line: Timeline) -> float:
    """The rate of optimizer step `step` (0-based within the level's schedule).

    Raises:
        ValueError: no such schedule, or `step` is outside the level.
    """
    if name not in SCHEDULES:
        raise ValueError(f"optimizer.scheduler_type: {name!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 <= step < line.steps:
        raise ValueError(f"step {step} lies outside the schedule's {line.steps} steps")
    if line.cycles > 1:
        line = line.cycle()
        step %= line.steps
    return lr * SCHEDULES[name].factor(step, line)
