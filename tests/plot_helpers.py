"""Run directories as the harness leaves them, with figures of a test's choice."""

from pathlib import Path

import pandas as pd

from harness_params import dump_yaml, make_config
from utils.plot_results import load_groups
from utils.plots.groups import Group

LAYERS = ["fc1.weight", "fc2.weight", "fc3.weight"]
EPOCHS = 2


def write_run(
    folder: Path, name: str, accuracies, densities=None, seed=0, layers=None, planned=None, best_val=(), **options
) -> Path:
    """A run directory as the harness leaves it, with figures of the test's choice: one level per accuracy."""
    nested: dict = {"experiment_params": {"seed": seed, "expt_name": name}, "prune_params": {}}
    nested["prune_params"]["num_levels"] = planned or len(accuracies)
    for path, value in options.items():
        section, key = path.split(".")
        nested.setdefault(section, {})[key] = value
    run = folder / name
    (run / "metrics" / "epochwise_metrics").mkdir(parents=True)
    (run / "expt_config.yaml").write_text(dump_yaml(make_config(nested)))
    densities = densities or [0.5**level for level in range(len(accuracies))]
    rows = [
        {"level": i, "density": d, "sparsity": 1 - d, "final_test_acc": a, "max_test_acc": a + 1,
         "final_test_loss": 0.5, "epochs": EPOCHS, "seconds": 10.0}
        for i, (a, d) in enumerate(zip(accuracies, densities))
    ]  # fmt: skip
    more = [{"best_val_test_acc": accuracy} for accuracy in best_val] or [{}] * len(rows)
    rows = [{**row, **columns} for row, columns in zip(rows, more, strict=True)]
    pd.DataFrame(rows).to_csv(run / "metrics" / "summary.csv", index=False)
    table = []
    for i, d in enumerate(densities):
        own = layers[i] if layers else [d] * len(LAYERS)
        table += [{"level": i, "layer": n, "kept": round(1000 * k), "total": 1000, "density": k, "dead": k == 0}
                  for n, k in zip(LAYERS, own)]  # fmt: skip
        epoch = {"train_loss": 1.0, "test_loss": 1.1, "train_acc": 50.0 + seed, "test_acc": 40.0}
        epoch |= {"lr": 0.1, "seconds": 5.0, "images_per_second": 1.0}
        epochs = [{"epoch": e, **epoch} for e in range(EPOCHS)]
        pd.DataFrame(epochs).to_csv(run / "metrics" / "epochwise_metrics" / f"level_{i}_metrics.csv", index=False)
    pd.DataFrame(table).to_csv(run / "metrics" / "layerwise_density.csv", index=False)
    return run


def one_shot(folder: Path, method: str, start: float, accuracy: float, seed: int = 0, **options) -> Path:
    chosen = {"prune_params.er_method": method, "prune_params.er_init": start, **options}
    return write_run(folder, f"{method}_{start}_{seed}", [accuracy], [start], seed, **chosen)


def groups_of(folder: Path, kind: str = "accuracy") -> list[Group]:
    return load_groups([str(folder)], kind)


def write_study(folder: Path) -> Path:
    """IMP of three seeds, and SNIP at two densities of two."""
    for seed, accuracies in enumerate([[90, 91, 80], [92, 92, 84], [88, 93, 85]]):
        write_run(folder, f"imp_{seed}", accuracies, seed=seed)
    for seed in (0, 1):
        one_shot(folder, "snip", 0.5, 86 + 2 * seed, seed)
        one_shot(folder, "snip", 0.1, 70 + seed, seed)
    return folder
