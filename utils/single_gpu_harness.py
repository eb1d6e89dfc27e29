"""The same study in one process and one screen, its training step written out. Read this file first.

    python -m utils.single_gpu_harness --config configs/NAME.yaml [--section.key=value ...]

It leaves the same checkpoints and CSVs as harness.py, bit for bit. What it lacks: several processes, resuming, CUDA
graphs, and an answer to signals.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from harness_params import Config, load_config
from harness_utils import Run, open_run, print_levels
from utils.conv_type import apply_masks, density, mask_gradients
from utils.data.mixing import hard_labels
from utils.dataset import load_data
from utils.distributed import Context, share_out_threads
from utils.errors import report
from utils.output import at_level, best_effort_streams, note
from utils.processes.tasks import check_tasks
from utils.runs.directory import check_run_directory
from utils.runs.opening import record_of
from utils.runs.plain import check_options, ignored
from utils.runs.points import check_points, points_of, rewind_step, save_points
from utils.runs.pruning import check_pruning, prune_level
from utils.runs.snapshots import Snapshot
from utils.runs.tables import LAYERS, SUMMARY, Row, epoch_table, is_evaluated, summary_row
from utils.runs.tickets import start_from_ticket
from utils.runs.weights import check_level, layer_rows
from utils.schedulers import learning_rate
from utils.seeds import stable_seed
from utils.state_dicts import load_weights
from utils.training.caller import left_as_found
from utils.training.compiling import compile_network
from utils.training.evaluation import Evaluation
from utils.training.hardware import autocast, autocast_dtype, configure_kernels, limit_threads
from utils.training.setup import build_model, make_timeline, optimizer_state, set_rate, start_optimizer
from utils.training.tally import finite_losses, training_figures

PROGRAM = "single_gpu_harness"


class SingleProcess:
    """One network, its data and its optimizer, in one process on one device."""

    def __init__(self, cfg: Config):
        configure_kernels(cfg.experiment_params.deterministic)
        share_out_threads(1, cfg.dist_params.threads)
        self.ctx = ctx = Context(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.cfg, self.device = cfg, ctx.device
        self.data = load_data(cfg, ctx)
        self.model = build_model(cfg, self.data, ctx)
        self.ticket = start_from_ticket(cfg, ctx, self.data, self.model)
        check_pruning(cfg, self.model, self.data, self.ticket.density if self.ticket else 1.0)
        limit_threads(cfg, ctx, self.model)
        self.compiled = compile_network(cfg, ctx, self.model, self.data)
        self.dtype = autocast_dtype(cfg.experiment_params.precision, self.device)
        self.autocast = functools.partial(autocast, self.device, self.dtype)
        self.evaluation = Evaluation(ctx, self.model, self.data, self.autocast)
        self.timeline = make_timeline(cfg, self.data)
        self.steps = self.data.train.steps_per_epoch
        check_points(cfg, self.steps, self.ticket.first_step if self.ticket else 0)
        self.points = points_of(cfg, self.steps)

    def run_levels(self, run: Run) -> None:
        """Every level: prune, rewind, train, log."""
        e, p, model, initial_density = self.cfg.experiment_params, self.cfg.prune_params, self.model, 1.0
        for level in range(p.num_levels):
            at_level(level)
            prune_level(self.cfg, model, self.data, level, initial_density)
            apply_masks(model)
            pruned_accuracy = self.evaluation.read(self.evaluation.count())["test_acc"]

            begin, state = 0, None  # optimizer step of the schedule
            if level == 0:
                initial_density = density(model)
                run.save_checkpoint("init", Snapshot(model.state_dict()))
                if self.ticket:
                    begin, state = self.ticket.first_step, self.ticket.optimizer
            elif e.training_type == "imp":
                load_weights(model, run.load_checkpoint("init"), "model_init.pt")
            elif e.training_type == "wr":
                load_weights(model, run.load_checkpoint("rewind"), "model_rewind.pt")
                begin, state = rewind_step(self.cfg, self.steps), run.load_artifact("optimizer_rewind")
            apply_masks(model)
            # Fresh, or as at step k; its hook applies the masks after every step.
            self.optimizer, self.scaler = start_optimizer(self.cfg, model, self.dtype, state)
            if level == 0:
                self.keep_points(run, begin)

            rows = []
            for epoch in range(begin // self.steps, e.epochs_per_level):
                rows.append(self.train_epoch(run, level, epoch, max(0, begin - epoch * self.steps)))

            check_level(model, level)
            run.save_checkpoint(f"level_{level}", Snapshot(model.state_dict()))
            run.tables.add(LAYERS, layer_rows(model, level))
            run.tables.add(SUMMARY, [summary_row(level, density(model), rows, pruned_accuracy)])

    def train_epoch(self, run: Run, level: int, epoch: int, first: int) -> Row:
        """Trains from step `first` to the epoch's end and evaluates; logs the epoch's row of the CSV."""
        e, o, train = self.cfg.experiment_params, self.cfg.optimizer, self.data.train
        torch.manual_seed(stable_seed(e.seed, level, epoch, 0))
        start, steps = time.perf_counter(), self.steps
        losses = torch.zeros(steps, dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.train()
        for step, (images, labels) in enumerate(train.batches(level, epoch, first), first):
            set_rate(self.optimizer, learning_rate(o.scheduler_type, o.lr, epoch * steps + step, self.timeline))
            with self.autocast():
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=o.label_smoothing)
            self.scaler.scale(loss).backward()
            if o.grad_clip:
                self.scaler.unscale_(self.optimizer)
                mask_gradients(self.model)
                nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip)
            self.scaler.step(self.optimizer)  # masked weights are zero again when it returns
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            losses[step] = loss.detach()
            correct += (logits.argmax(1) == hard_labels(labels)).sum()
            if level == 0:
                self.keep_points(run, epoch * steps + step + 1)

        sizes = [train.global_batch(step) for step in range(first, steps)]
        finite = finite_losses(self.ctx, self.model, losses, level, epoch)[first:]
        figures = training_figures(finite, sizes, int(correct), time.perf_counter() - start)
        counted = self.evaluation.count() if is_evaluated(self.cfg, epoch) else self.evaluation.not_counted()
        figures |= self.evaluation.read(counted)
        rate = learning_rate(o.scheduler_type, o.lr, epoch * steps + first, self.timeline)
        row = {"epoch": epoch, "lr": rate, "seconds": time.perf_counter() - start, **figures}
        run.tables.add(epoch_table(level), [row])
        return row

    def keep_points(self, run: Run, step: int) -> None:
        """Saves the state that is to be kept after `step` steps of level 0, if any is: where wr rewinds to, say."""
        if step in self.points:
            optimizer = optimizer_state(self.optimizer, self.scaler)
            save_points(run, self.points[step], step, self.model.state_dict(), optimizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status. Called from Python, it leaves the process as it was."""
    try:
        with left_as_found(PROGRAM):
            cfg = load_config(argv)
            check_options(cfg)
            check_tasks(cfg.dist_params.distributed)
            check_run_directory(cfg)
            note(*cfg.notes, *ignored(cfg))
            study = SingleProcess(cfg)
            record = record_of(study.ticket, study.data, study.model, study.dtype, study.compiled, graphs=False)
            with contextlib.closing(study.data), open_run(cfg, record) as run:
                study.run_levels(run)
                print_levels(run)
    except Exception as error:
        return report(error, PROGRAM)
    return 0


if __name__ == "__main__":
    best_effort_streams(PROGRAM)
    sys.exit(main())
