"""The same study in the plainest way: one process, no process group, no resuming, no signals. Read this file first.

    python -m utils.single_gpu_harness --config configs/NAME.yaml [--section.key=value ...]

It leaves the same checkpoints and CSVs as harness.py, bit for bit: it shares the training code (`Trainer`), pruning
(`prune_level`) and logs (`Run`), and writes out what a level is.
"""

import contextlib
import sys
import time

import torch

from harness_params import Config, ConfigError, load_config
from harness_utils import Run, open_run, print_levels
from utils.conv_type import apply_masks, density
from utils.dataset import load_data
from utils.distributed import Context, share_out_threads
from utils.runs.directory import check_run_directory
from utils.runs.pruning import check_pruning, prune_level
from utils.runs.tables import EPOCH_COLUMNS, SUMMARY_COLUMNS, layer_rows
from utils.runs.weights import cpu_copy, load_weights
from utils.seeds import stable_seed
from utils.training.hardware import configure_kernels
from utils.training.trainer import Trainer, build_model


def make_trainer(cfg: Config) -> Trainer:
    """The network and its data, on the GPU where there is one."""
    configure_kernels(cfg.experiment_params.deterministic)
    share_out_threads(1, cfg.dist_params.threads)
    ctx = Context(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_data(cfg, ctx)
    model = build_model(cfg, data, ctx)
    check_pruning(cfg, model, data)
    return Trainer(cfg, ctx, model, data)


def run_levels(cfg: Config, trainer: Trainer, run: Run) -> None:
    """Every level: prune, rewind, train, log."""
    e, p, model, initial_density = cfg.experiment_params, cfg.prune_params, trainer.model, 1.0
    for level in range(p.num_levels):
        prune_level(cfg, model, trainer.data, level, initial_density)

        first_epoch, optimizer_state = 0, None
        if level == 0:
            initial_density = density(model)
            run.save_checkpoint("init", cpu_copy(model.state_dict()))
        elif e.training_type == "imp":
            load_weights(model, run.load_checkpoint("init"), "model_init.pt")
        elif e.training_type == "wr":
            load_weights(model, run.load_checkpoint("rewind"), "model_rewind.pt")
            first_epoch, optimizer_state = p.rewind_epoch, run.load_artifact("optimizer_rewind")
        apply_masks(model)
        trainer.restart(optimizer_state)

        rows = train_level(cfg, run, trainer, level, first_epoch)

        run.save_checkpoint(f"level_{level}", cpu_copy(model.state_dict()))
        run.add_rows("layerwise_density", layer_rows(model, level))
        best, seconds = max(row["test_acc"] for row in rows), sum(row["seconds"] for row in rows)
        d, last = density(model), rows[-1]
        values = (level, d, 1 - d, last["test_acc"], best, last["test_loss"], len(rows), seconds)
        run.add_rows("summary", [dict(zip(SUMMARY_COLUMNS, values))])


def train_level(cfg: Config, run: Run, trainer: Trainer, level: int, first_epoch: int) -> list[dict]:
    """Trains a level's epochs from `first_epoch` on; returns their CSV rows."""
    e, p, rows = cfg.experiment_params, cfg.prune_params, []
    for epoch in range(first_epoch, e.epochs_per_level):
        torch.manual_seed(stable_seed(e.seed, level, epoch, 0))
        start = time.perf_counter()
        tally = trainer.new_tally()
        trainer.train_epoch(level, epoch, tally, stop=lambda steps: False)
        train_loss, train_acc = trainer.epoch_result(level, epoch, tally)
        train = trainer.data.train
        speed = sum(map(train.global_batch, range(train.steps_per_epoch))) / (time.perf_counter() - start)
        test_loss, test_acc = trainer.evaluate()
        seconds = time.perf_counter() - start
        values = (epoch, train_loss, test_loss, train_acc, test_acc, trainer.rate(epoch), seconds, speed)
        rows.append(dict(zip(EPOCH_COLUMNS, values)))
        run.add_rows(f"epochwise_metrics/level_{level}_metrics", rows[-1:])
        if level == 0 and e.training_type == "wr" and epoch + 1 == p.rewind_epoch:
            run.save_checkpoint("rewind", cpu_copy(trainer.model.state_dict()))
            run.save_artifact("optimizer_rewind", cpu_copy(trainer.optimizer_state_dict()))
    return rows


def main() -> int:
    """Runs the study; errors are told as they come. Returns the exit status."""
    try:
        cfg = load_config()
        if cfg.experiment_params.resume_expt_name:
            raise ConfigError(["experiment_params.resume_expt_name: only harness.py resumes"])
        check_run_directory(cfg)
        for note in cfg.notes:
            print(note, file=sys.stderr)
        trainer = make_trainer(cfg)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    with contextlib.closing(trainer.data), open_run(cfg) as run:
        run_levels(cfg, trainer, run)
        print_levels(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
