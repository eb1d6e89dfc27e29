"""Faults that a test lays in a run before it begins (`Forks.start`'s `trap`), and the runs they are laid in."""

import functools
import io
import json
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

SYNFLOW = {
    "prune_params.er_method": "synflow",
    "prune_params.er_init": 0.5,
    "prune_params.synflow_rounds": 10,
    "experiment_params.training_type": "lrr",
}
KINDS = {
    "imp": {"experiment_params.training_type": "imp"},
    "wr": {"experiment_params.training_type": "wr", "prune_params.rewind_epoch": 1},
    "lrr": {"experiment_params.training_type": "lrr"},
    "synflow": SYNFLOW,
}
SHORT = {"prune_params.num_levels": 2, "experiment_params.epochs_per_level": 2, "dataset.batch_size": 500}


def begun(path: Path) -> bool:
    """Whether there is a run to resume at `path`."""
    return (path / "expt_config.yaml").exists()


def states_of(path: Path) -> list[Path]:
    """Files of the saved states, newest first."""
    index = json.loads((path / "artifacts" / "state.json").read_text())
    return [path / "artifacts" / entry["file"] for entry in index]


def pack(obj: object) -> memoryview:
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getbuffer()


class DieAt:
    """Ends the process, as kill -9 would, before or after its n-th call of one of the functions that make files."""

    def __init__(self, place: int):
        self.place = place

    def __call__(self) -> None:
        self.count = 0
        for name in ("fsync", "replace"):
            setattr(os, name, functools.partial(self.counted, getattr(os, name)))

    def counted(self, function: Callable, *args):
        if self.count == self.place:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        return function(*args)


class StopAt:
    """Sends the process a signal while it takes step `step` of an epoch, once."""

    def __init__(self, *steps: int, signum: int = signal.SIGTERM):
        self.steps, self.signum = steps, signum

    def __call__(self) -> None:
        from utils.runs.stopping import StopRequest

        plain, self.calls = StopRequest.__call__, 0

        def asked(request, steps: int) -> bool:
            self.calls += 1
            if self.calls in self.steps:
                os.kill(os.getpid(), self.signum)
            return plain(request, steps)

        StopRequest.__call__ = asked


UNMET = 70


class MustBeMet:
    """A fault that the run has to meet, or to call by `met`: otherwise the run ends with status `UNMET`.

    What is laid by replacing a function is not laid any more once the program calls another; the test would go on
    passing. The note is shared with the processes that the run starts.
    """

    def __call__(self) -> None:
        self._note = mmap.mmap(-1, 1)
        self.lay()

    def lay(self) -> None:
        raise NotImplementedError

    def met(self) -> None:
        self._note[0] = 1

    @property
    def unmet(self) -> bool:
        return not self._note[0]


def unmet(trap: Callable | None) -> list[str]:
    """Names of the faults laid by `trap` that had to be met and were not."""
    traps = trap.traps if isinstance(trap, Both) else (trap,)
    return [type(one).__name__ for one in traps if isinstance(one, MustBeMet) and one.unmet]


class Dropout(MustBeMet):
    """Dropout after every BatchNorm of the network, which none of the small models has."""

    def lay(self) -> None:
        from utils.training import setup

        plain = setup.create_model

        def create(*args, **kwargs):
            model = plain(*args, **kwargs)
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.register_forward_hook(self.dropped)
            return model

        setup.create_model = create

    def dropped(self, module: torch.nn.Module, _, out: torch.Tensor) -> torch.Tensor:
        if module.training:
            self.met()
        return torch.dropout(out, 0.1, module.training)


class Uncapturable(MustBeMet):
    """A network whose training cannot be captured as a CUDA graph, though it does not wait for the GPU."""

    def lay(self) -> None:
        from utils.training.trainer import Trainer

        plain = Trainer._backward

        def backward(trainer: Trainer, loss: torch.Tensor) -> None:
            plain(trainer, loss)
            self.met()
            torch.cuda.current_stream().query()

        Trainer._backward = backward


class Both:
    def __init__(self, *traps: Callable):
        self.traps = traps

    def __call__(self) -> None:
        for trap in self.traps:
            trap()


class KillAfterWrite:
    """kill -9 once a file of this name has been written `count` times."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __call__(self) -> None:
        from utils import files

        plain = files.rename

        def rename(part: Path, path: Path) -> None:
            plain(part, path)
            self.count -= path.name == self.name
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        files.rename = rename


class StateEachStep(MustBeMet):
    """A resume state after every step, whatever the clock says."""

    def lay(self) -> None:
        from utils.runs.saving import SaveClock

        SaveClock.due = self.due

    def due(self) -> bool:
        self.met()
        return True
