"""Images per second of several runs on one GPU together, with MPS and without it.

    python tests/benchmarks/sharing.py --config configs/cifar10_resnet20_fast.yaml [--jobs 1,4] [--epochs 10]
                                       [--section.key=value ...]

Per number of jobs, `utils.run_grid` runs so many seeds of the config at a time, one level each, with `mps: off`, then
`mps: on`. A run's figure is the median of its epochs' images_per_second, without the first third, in which runs still
start and compile; the sum over the runs is what the GPU does. A row without MPS shows the exit status of its grid.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pandas as pd
import yaml

from utils import run_grid
from utils.runs.tables import epoch_table, table_file


def measure(folder: Path, jobs: int, mps: str, args: argparse.Namespace, words: list[str]) -> str:
    """A row of the table."""
    name = f"{jobs}_{mps}"
    grid = {
        "config": args.config, "base_dir": str(folder / name), "jobs": jobs, "mps": mps, "seeds": list(range(jobs)),
        "set": {"prune_params.num_levels": 1, "experiment_params.epochs_per_level": args.epochs}, "runs": {"run": {}},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(grid))
    start = time.monotonic()
    status = run_grid.main([str(path), *words])
    if status:
        return f"| {jobs} | {mps} | exit {status} | | |"
    rates = []
    for seed in range(jobs):
        table = pd.read_csv(table_file(folder / name / f"run_seed{seed}", epoch_table(0)))
        rates.append(statistics.median(table["images_per_second"][args.epochs // 3 :]))
    cells = f"{sum(rates):,.0f} | {min(rates):,.0f}-{max(rates):,.0f} | {time.monotonic() - start:.1f}"
    return f"| {jobs} | {mps} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--jobs", default="1,4", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--epochs", default=10, type=int)
    args, words = parser.parse_known_args()
    rows = ["| runs | mps | images/s in all | of each | seconds, start included |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for jobs in args.jobs:
            rows += [measure(Path(folder), jobs, mps, args, words) for mps in (("off", "on") if jobs > 1 else ("off",))]
    print("\n".join(rows))


if __name__ == "__main__":
    main()
