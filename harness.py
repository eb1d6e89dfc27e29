"""Entry point: from one YAML to a study of lottery tickets.

    python harness.py --config configs/NAME.yaml [--section.key=value ...]

Loads the config, starts the workers (or finds that torchrun did), and runs the levels: prune, rewind, train, log.
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

import torch
from tqdm import tqdm

from harness_params import Config, load_config
from harness_utils import Run, open_run, print_levels
from utils import distributed
from utils.conv_type import apply_masks, density, masked_params
from utils.dataset import load_data
from utils.distributed import Context
from utils.errors import RunError, print_report, report
from utils.launcher import WorkerFailure, end_at_once, launch
from utils.processes.place import started_by_launcher, started_rank
from utils.processes.signals import Stopped
from utils.runs import resume
from utils.runs.directory import check_run_directory, taken_up_again
from utils.runs.pruning import check_pruning, prune_level
from utils.runs.stopping import StopRequest
from utils.runs.tables import SUMMARY_COLUMNS, layer_rows
from utils.runs.weights import cpu_copy, load_weights
from utils.seeds import stable_seed
from utils.training.hardware import configure_kernels
from utils.training.trainer import Tally, Trainer, build_model


def run_levels(cfg: Config, ctx: Context) -> int:
    """A whole run, on this rank: every level pruned, rewound, trained and logged. Returns the exit status."""
    stop = StopRequest(ctx)
    data = load_data(cfg, ctx)
    trainer = Trainer(cfg, ctx, build_model(cfg, data, ctx), data)
    check_pruning(cfg, trainer.model, data)
    # From here on there is something on disk.
    with contextlib.closing(data), open_run(cfg) if ctx.is_main else contextlib.nullcontext() as run:
        harness = Harness(cfg, ctx, trainer, run, stop)
        resume.restore(harness)
        try:
            while harness.level < cfg.prune_params.num_levels:
                if not harness.begun:
                    harness.prune()
                    harness.rewind()
                harness.train_level()
                harness.finish_level()
        except Stopped as stopped:
            if ctx.is_main:
                hint = f"resume with the same options and --experiment_params.resume_expt_name={run.path.name}"
                print(f"harness: {stopped}; {hint}", file=sys.stderr)
            return 128 + stopped.signum
        if ctx.is_main:
            print_levels(run)
    return 0


class Harness:
    """Where a run stands, and what its levels do.

    Attributes:
        level: the level in progress, from 0.
        begun: whether it has been pruned and rewound.
        epoch: the next epoch of its schedule to train; weight rewinding starts at epoch k.
        tally: what the epoch in progress has counted, when it was stopped in its middle.
        initial_density: d0, the density left by pruning at initialization.
    """

    def __init__(self, cfg: Config, ctx: Context, trainer: Trainer, run: Run | None, stop: StopRequest):
        self.cfg, self.ctx, self.trainer, self.run, self.stop = cfg, ctx, trainer, run, stop
        self.model, self.data = trainer.model, trainer.data
        self.level, self.begun, self.epoch = 0, False, 0
        self.tally: Tally | None = None
        self.initial_density = 1.0
        self.best = self.seconds = 0.0
        self.last: dict[str, Any] = {}
        self.saved_at = time.monotonic()
        hidden = not (ctx.is_main and sys.stdout.isatty())
        self.bar = tqdm(total=cfg.prune_params.num_levels, desc="levels", disable=hidden, file=sys.stdout, position=0)

    # --- a level -----------------------------------------------------------------------------------------------------

    def prune(self) -> None:
        """Rank 0 prunes to the level's density; every rank gets its masks, and they are checked to be the same."""
        if self.ctx.is_main:
            prune_level(self.cfg, self.model, self.data, self.level, self.initial_density)
        masks = [mask for _, _, mask in masked_params(self.model)]
        self.ctx.broadcast_tensors(masks)
        apply_masks(self.model)
        if not self.ctx.same_everywhere(masks):
            raise RunError(f"the ranks hold different masks after pruning for level {self.level}")
        if self.level == 0:
            self.initial_density = density(self.model)
            if self.run:
                self.run.save_checkpoint("init", cpu_copy(self.model.state_dict()))

    def rewind(self) -> None:
        """Weights, BN statistics, optimizer and schedule to where the level starts (DESIGN 5's table)."""
        kind = self.cfg.experiment_params.training_type
        self.epoch, optimizer_state = 0, None
        if self.level > 0 and kind != "lrr":
            name = {"imp": "init", "wr": "rewind"}[kind]
            if self.run:
                load_weights(self.model, self.run.load_checkpoint(name), str(self.run.checkpoint(name)))
                apply_masks(self.model)
                optimizer_state = self.run.load_artifact("optimizer_rewind") if kind == "wr" else None
            self.ctx.broadcast_tensors(list(self.model.state_dict().values()))
            if kind == "wr":
                self.epoch = self.cfg.prune_params.rewind_epoch
                optimizer_state = self.ctx.broadcast_object(optimizer_state)
        self.trainer.restart(optimizer_state)
        self.begun, self.best, self.seconds, self.tally = True, 0.0, 0.0, None
        if self.run:
            self.run.tables[self._epoch_table] = []

    def train_level(self) -> None:
        """Trains the level's remaining epochs; after each one a CSV row and, as often as asked for, a resume state.

        Raises:
            Stopped: a signal asked for it; the state is saved.
        """
        end = self.cfg.experiment_params.epochs_per_level
        with tqdm(
            total=end, initial=self.epoch, desc=f"level {self.level}", disable=self.bar.disable, file=sys.stdout,
            position=1, leave=False,
        ) as bar:  # fmt: skip
            while self.epoch < end:
                row = self._train_epoch()
                bar.update()
                bar.set_postfix({k: f"{row[k]:.4g}" for k in ("train_loss", "test_acc", "images_per_second")})

    def _train_epoch(self) -> dict[str, Any]:
        epoch = self.epoch
        if self.tally is None:  # dropout's draws depend on the epoch alone, so a resumed run makes the same
            self.tally = self.trainer.new_tally()
            torch.manual_seed(stable_seed(self.cfg.experiment_params.seed, self.level, epoch, self.ctx.rank))
        tally = self.tally
        start = time.perf_counter() - tally.seconds
        finished = self.trainer.train_epoch(self.level, epoch, tally, self.stop)
        tally.seconds = time.perf_counter() - start
        if not finished or self.stop.agreed():
            self._save_and_stop()
        train_loss, train_acc = self.trainer.epoch_result(self.level, epoch, tally)
        trained = time.perf_counter() - start
        test_loss, test_acc = self.trainer.evaluate()
        seconds = time.perf_counter() - start
        self.best, self.seconds = max(self.best, test_acc), self.seconds + seconds
        self.tally, self.epoch = None, epoch + 1
        row = {
            "epoch": epoch, "train_loss": train_loss, "test_loss": test_loss, "train_acc": train_acc,
            "test_acc": test_acc, "lr": self.trainer.rate(epoch), "seconds": seconds,
            "images_per_second": sum(map(self.data.train.global_batch, range(tally.step))) / trained,
        }  # fmt: skip
        self.last = row
        self._after_epoch(row)
        return row

    def _after_epoch(self, row: dict[str, Any]) -> None:
        p, e = self.cfg.prune_params, self.cfg.experiment_params
        if self.run:
            self.run.add_rows(self._epoch_table, [row])
            if self.level == 0 and e.training_type == "wr" and self.epoch == p.rewind_epoch:
                self.run.save_checkpoint("rewind", cpu_copy(self.model.state_dict()))
                self.run.save_artifact("optimizer_rewind", cpu_copy(self.trainer.optimizer_state_dict()))
            if self.epoch < e.epochs_per_level and self._due():
                self._save_state()
        if self.stop.agreed():
            self._save_and_stop()

    def finish_level(self) -> None:
        """The level's checkpoint, its rows in the CSVs, and a state that says the next level is to begin."""
        if self.run:
            level, d, layers = self.level, density(self.model), layer_rows(self.model, self.level)
            self.run.save_checkpoint(f"level_{level}", cpu_copy(self.model.state_dict()))
            self.run.add_rows("layerwise_density", layers)
            epochs = len(self.run.tables[self._epoch_table])
            values = (level, d, 1 - d, self.last["test_acc"], self.best, self.last["test_loss"], epochs, self.seconds)
            self.run.add_rows("summary", [dict(zip(SUMMARY_COLUMNS, values))])
            self.run.tables.pop(self._epoch_table)
        self.level, self.begun = self.level + 1, False
        self._save_state()
        self.bar.update()

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def _epoch_table(self) -> str:
        return f"epochwise_metrics/level_{self.level}_metrics"

    def _due(self) -> bool:
        e = self.cfg.experiment_params
        return bool(
            (e.save_every_epochs and self.epoch % e.save_every_epochs == 0)
            or (e.save_every_minutes and time.monotonic() - self.saved_at >= 60 * e.save_every_minutes)
        )

    def _save_state(self) -> None:
        if self.run:
            self.run.save_state(resume.capture(self))
            self.saved_at = time.monotonic()

    def _save_and_stop(self) -> None:
        self.stop.saving()
        mid_epoch = resume.capture_epoch(self)
        if self.run:
            self.run.save_state(resume.capture(self, mid_epoch))
            self.run.writer.flush()
        self.ctx.barrier()  # torchrun ends the others as soon as one has ended
        raise Stopped(self.stop.signum)


# --- starting --------------------------------------------------------------------------------------------------------


def work(cfg: Config) -> int:
    """What each process does: joins the others and runs the levels. Returns the exit status."""
    d = cfg.dist_params
    configure_kernels(cfg.experiment_params.deterministic)
    with distributed.join(d.backend, d.timeout_minutes, d.threads) as ctx:
        return run_levels(cfg, ctx)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs harness.py; returns its exit status (DESIGN 7): 0, 1 failed, 2 config error, 128 + signal when stopped."""
    try:
        cfg = load_config(argv)
        notes = distributed.notes_on(cfg)
        if started_rank() == 0:  # the other machines of a run may not even see its directory
            cfg = taken_up_again(cfg)
            check_run_directory(cfg)
            for note in notes:
                print(f"harness: note: {note}", file=sys.stderr)
        d = cfg.dist_params
        nproc = distributed.default_nproc(d.nproc) if d.distributed else 1
        if nproc == 1 or started_by_launcher():
            return work(cfg)
        return launch(work, (cfg,), nproc, d.address, d.port)
    except Stopped as stopped:
        print(f"harness: {stopped}", file=sys.stderr)
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
