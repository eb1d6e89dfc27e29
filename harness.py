"""Entry point: from one YAML to a study of lottery tickets.

    python harness.py --config configs/NAME.yaml [--section.key=value ...]

Loads the config, starts the workers (unless torchrun did), and runs the levels: prune, rewind, train, log.
"""

if __name__ in ("__main__", "__mp_main__"):  # first of all: the imports below take seconds
    from utils.processes.signals import exit_quietly

    exit_quietly(worker=__name__ == "__mp_main__")
    if __name__ == "__main__":
        from harness_params import end_on_faults

        end_on_faults()

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from harness_params import Config, load_config
from harness_utils import Run, open_run, print_levels, resume_command, tells_finished
from utils import distributed
from utils.conv_type import apply_masks, density, masked_params
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import RunError, print_report, report
from utils.launcher import WorkerFailure, end_at_once, launch
from utils.output import at_level, complain, program
from utils.processes.place import started_by_launcher
from utils.processes.signals import Stopped
from utils.runs import plugin_files, resume
from utils.runs.opening import begin, record_of
from utils.runs.points import Points, check_points, rewind_step
from utils.runs.progress import Progress
from utils.runs.pruning import check_pruning, prune_level
from utils.runs.saving import SaveClock
from utils.runs.snapshots import Snapshot
from utils.runs.states import Position
from utils.runs.stopping import Stop, StopRequest
from utils.runs.tables import LAYERS, SUMMARY, Row, epoch_table, is_evaluated, summary_row
from utils.runs.tickets import Ticket, start_from_ticket
from utils.runs.weights import check_level, layer_rows
from utils.state_dicts import load_weights
from utils.training.caller import left_as_found
from utils.training.hardware import configure_kernels
from utils.training.setup import build_model
from utils.training.trainer import Trainer


def run_levels(cfg: Config, ctx: Context) -> int:
    """A whole run, on this rank: prunes, rewinds, trains and logs every level. Returns the exit status."""
    stop = StopRequest(ctx, SaveClock(cfg.experiment_params.save_every_minutes))
    plugin_files.load_everywhere(cfg, ctx)
    data = load_data(cfg, ctx)
    model = build_model(cfg, data, ctx)
    ticket = start_from_ticket(cfg, ctx, data, model)
    check_pruning(cfg, model, data, ticket.density if ticket else 1.0)
    check_points(cfg, data.train.steps_per_epoch, ticket.first_step if ticket else 0)
    trainer = Trainer(cfg, ctx, model, data)
    # From here on there is something on disk.
    record = record_of(ticket, data, model, trainer.dtype, trainer.compiled, bool(trainer.graphs))
    with contextlib.closing(data), open_run(cfg, record) if ctx.is_main else contextlib.nullcontext() as run:
        harness = Harness(cfg, ctx, trainer, run, stop, ticket)
        try:
            harness.take_up()
            with harness.progress:
                while harness.position.level < cfg.prune_params.num_levels:
                    at_level(harness.position.level)
                    if not harness.position.begun:
                        harness.prune()
                        harness.rewind()
                    harness.train_level()
                    harness.finish_level()
        except Stopped as stopped:
            if run:
                complain(f"harness: {stopped}; go on with: {resume_command(run.path, cfg)}")
            return 128 + stopped.signum
        if run:
            print_levels(run)
    return 0


class Harness:
    """The levels of a run, on one rank.

    Attributes:
        trainer: network, data and optimizer.
        run: what is written; rank 0's alone, None on the others.
        position: where the run stands.
        ticket: what level 0 starts from; None = a fresh network.
        points: states of level 0 that are kept.
        progress: what a person sees of it.
    """

    def __init__(
        self, cfg: Config, ctx: Context, trainer: Trainer, run: Run | None, stop: Stop, ticket: Ticket | None = None
    ):
        self.cfg, self.ctx, self.trainer, self.run, self.stop, self.ticket = cfg, ctx, trainer, run, stop, ticket
        self.model, self.data, self.position = trainer.model, trainer.data, Position()
        self.points, self.began = Points(cfg, trainer), 0.0  # began: when the epoch would have, had it not been stopped
        steps = trainer.timeline.steps_per_epoch
        known = (ticket.first_step if ticket else 0) // steps, rewind_step(cfg, steps) // steps
        self.progress = Progress(cfg, self.position, run, steps, known)

    def take_up(self) -> None:
        """Restores the position of a resumed run; does nothing in a fresh run. Errors as `resume.restore`."""
        resume.restore(self.cfg, self.ctx, self.trainer, self.position, self.run)
        self.points.keep(self.run, self.position, missing_only=True)

    # --- a level -----------------------------------------------------------------------------------------------------

    def prune(self) -> None:
        """Prunes to the level's density on rank 0; every rank gets its masks, and they are checked to be the same."""
        level = self.position.level
        self.progress.prune()
        if self.ctx.is_main:
            prune_level(self.cfg, self.model, self.data, level, self.position.initial_density)
        masks = [mask for _, _, mask in masked_params(self.model)]
        self.ctx.broadcast_tensors(masks)
        apply_masks(self.model)
        if not self.ctx.same_everywhere(masks):
            raise RunError(f"the ranks hold different masks after pruning for level {level}")
        _, self.position.pruned_accuracy = self.trainer.evaluate()
        if level == 0:
            self.position.initial_density = density(self.model)
            if self.run:
                self.run.save_checkpoint("init", Snapshot(self.model.state_dict()))

    def rewind(self) -> None:
        """Sets weights, BatchNorm statistics, optimizer and schedule to where the level starts (configs/README.md)."""
        kind, level, step, optimizer_state = self.cfg.experiment_params.training_type, self.position.level, 0, None
        if level == 0 and self.ticket:
            step, optimizer_state = self.ticket.first_step, self.ticket.optimizer
        elif level > 0 and kind != "lrr":
            name = {"imp": "init", "wr": "rewind"}[kind]
            if self.run:
                load_weights(self.model, self.run.load_checkpoint(name), str(self.run.checkpoint(name)))
                apply_masks(self.model)
                optimizer_state = self.run.load_artifact("optimizer_rewind") if kind == "wr" else None
            self.ctx.broadcast_tensors(list(self.model.state_dict().values()))
            if kind == "wr":
                step = rewind_step(self.cfg, self.data.train.steps_per_epoch)
                optimizer_state = self.ctx.broadcast_object(optimizer_state)
        self.begin_level(step, optimizer_state)
        if level == 0 and self.ticket:
            self._save_state()  # from here on the run needs the ticket's source no more

    def begin_level(self, step: int = 0, optimizer_state: dict[str, Any] | None = None) -> None:
        """Starts the training of a level, whose weights and masks are in place, at any step of its schedule.

        Learning rate, data order and augmentation go on from this optimizer step, also in the middle of an epoch.

        Args:
            optimizer_state: of `Trainer.optimizer_state_dict`, the same on every rank; None for a fresh optimizer.
        """
        self.trainer.restart(optimizer_state)
        self.position.begin_level(self.trainer, step)
        self.began = time.perf_counter()
        if self.run:
            self.run.tables.start(epoch_table(self.position.level))
        self.points.keep(self.run, self.position)

    def train_level(self) -> None:
        """Trains the level's remaining epochs, each with a row of the CSV; saves resume states when they are due.

        Raises:
            Stopped: a signal asked for it; the state is saved.
        """
        self.progress.begin_level()
        while self.position.epoch < self.cfg.experiment_params.epochs_per_level:
            self._train_epoch()

    def _train_epoch(self) -> None:
        level, epoch = self.position.level, self.position.epoch
        if self.position.tally is None:
            self.position.begin_epoch(self.trainer)
        tally = self.position.tally
        assert tally is not None
        self.began = time.perf_counter() - tally.seconds
        finished = self.trainer.train_epoch(level, epoch, tally, self._after_step)
        if not finished or self.stop.agreed():
            self._save_and_stop()
        figures = self.trainer.finish_epoch(level, epoch, tally, evaluate=is_evaluated(self.cfg, epoch))
        rate, seconds = self.trainer.rate(epoch, tally.first), time.perf_counter() - self.began
        self._after_epoch({"epoch": epoch, "lr": rate, "seconds": seconds, **figures})

    def _after_step(self, steps: int) -> bool:
        """Whether to stop after `steps` steps of the epoch; saves the points of level 0 and the state if one is due."""
        self.points.keep(self.run, self.position)
        self.progress.step()
        if self.stop(steps):
            return True
        if self.stop.save_due and steps < self.trainer.timeline.steps_per_epoch:  # else _after_epoch saves it
            self._save_state()
        return False

    def _after_epoch(self, row: Row) -> None:
        e, position = self.cfg.experiment_params, self.position
        position.tally, position.epoch = None, position.epoch + 1
        if self.run:
            self.run.tables.add(epoch_table(position.level), [row])
            self.progress.end_epoch(row)
            by_epochs = e.save_every_epochs and position.epoch % e.save_every_epochs == 0
            if position.epoch < e.epochs_per_level and (by_epochs or self.stop.clock.due()):
                self._save_state()
        if self.stop.agreed():
            self._save_and_stop()

    def finish_level(self) -> None:
        """Saves the level's checkpoint, its rows in the CSVs, and a resume state at the start of the next level."""
        level = self.position.level
        check_level(self.model, level)
        self.position.level, self.position.begun = level + 1, False
        if self.run:
            with self.stop.clock.measured():
                state = resume.capture(self.cfg, self.trainer, self.position.state_dict(self.ctx))
                self.run.save_level(level, state)
                tables = self.run.tables
                tables.add(LAYERS, layer_rows(self.model, level))
                epochs, pruned = tables[epoch_table(level)], self.position.pruned_accuracy
                row = summary_row(level, density(self.model), epochs, pruned)
                tables.add(SUMMARY, [row])
                tables.drop(epoch_table(level))
                self.run.save_state(state)
            self.progress.end_level(row)

    # --- state -------------------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        """Saves the state; in the middle of an epoch all ranks call it together.

        Raises:
            RunError: in the middle of an epoch, a loss or a weight is not finite.
        """
        if self.position.tally and self.position.step:  # waits for the steps launched, which is not the saving's time
            self.trainer.sync_statistics()
            self.trainer.check_finite(self.position.level, self.position.epoch, self.position.tally)
            self.position.tally.seconds = time.perf_counter() - self.began
        with self.stop.clock.measured():
            position = self.position.state_dict(self.ctx)
            if self.run:
                self.run.save_state(resume.capture(self.cfg, self.trainer, position))

    def _save_and_stop(self) -> None:
        self.stop.hold_signals()
        self._save_state()
        if self.run:
            self.run.writer.flush()
        self.ctx.barrier()  # when one worker exits, torchrun kills the others
        raise Stopped(self.stop.signum)


# --- starting --------------------------------------------------------------------------------------------------------


def work(cfg: Config) -> int:
    """Joins the other processes and runs the levels, in each process. Returns the exit status."""
    d = cfg.dist_params
    configure_kernels(cfg.experiment_params.deterministic)
    with program("harness"), distributed.join(d.backend, d.timeout_minutes, d.threads) as ctx:
        return run_levels(cfg, ctx)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs harness.py; returns its exit status: 0 done, 1 failed, 2 config error, 128 + signal when stopped.

    Called from Python, it leaves the process as it was. In a thread, signals are the caller's.
    """
    try:
        with left_as_found("harness"):
            cfg = begin(load_config(argv))
            if tells_finished(cfg):
                return 0
            d = cfg.dist_params
            nproc = distributed.default_nproc(d.nproc) if d.distributed else 1
            here = nproc == 1 or started_by_launcher()
            return work(cfg) if here else launch(work, (cfg,), nproc, d.address, d.port)
    except Stopped as stopped:
        complain(f"harness: {stopped}")
        return 128 + stopped.signum
    except WorkerFailure as failure:
        return print_report(failure.record)
    except Exception as error:  # the last resort: whatever it is, one clear line comes last
        return report(error)


if __name__ == "__main__":
    exit_status = main()
    if exit_status and started_by_launcher():
        end_at_once(exit_status)
    sys.exit(exit_status)
