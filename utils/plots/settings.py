"""What the setting of a run was: in what it differs from a paper's experiment, its data, its hardware."""

from pathlib import Path
from typing import Any

from harness_params import SCHEMA
from utils.config.options import show
from utils.data.specs import DATASETS
from utils.plots.groups import is_about_pruning
from utils.plots.names import AXES, FILES, METHOD, OF_SOURCE, K
from utils.plots.published import Experiment
from utils.plots.runs import SavedRun
from utils.runs.records import saved_starts

UNKNOWN = "not recorded"
# Options that other columns of the papers' table tell: density, method, data.
TOLD_ELSEWHERE = {*AXES, *METHOD, *FILES, "dataset.loader", "ticket_params.step"}
Options = dict[str, Any]


def differences(run: SavedRun, experiment: Experiment, dense: bool = False) -> list[str]:
    """What differs between a run and an experiment, such as 'epochs_per_level 10 (55)': ours, and the paper's.

    Left out are the density, which has its columns, the method, and places of files. An option that has an effect in
    only one of the two, and its default there, is left out too.

    Args:
        dense: also leave out what is about pruning.
    """
    ours = run.options | _sizes(run.options, images_of(run))
    theirs = experiment.options | _sizes(experiment.options, experiment.images)
    paths = [path for path in [*ours, *(path for path in theirs if path not in ours)] if path not in TOLD_ELSEWHERE]
    told = []
    for path in paths:
        if (dense and is_about_pruning(path)) or ours.get(path) == theirs.get(path):
            continue
        both = path in ours and path in theirs
        if path.startswith(OF_SOURCE):
            # Of a ticket's source it is told only where it is not told of the run itself. Older runs have not noted it.
            if not both or ours[path] == ours.get(path.removeprefix(OF_SOURCE)):
                continue
        elif not both and path not in K and ours.get(path, theirs.get(path)) == _default(path):
            continue
        told.append(f"{_name(path)} {_value(ours, path)} ({_value(theirs, path)})")
    return told


def _default(path: str) -> Any:
    return SCHEMA.default(path) if SCHEMA.find(path) else None


def _name(path: str) -> str:
    """'epochs_per_level', 'its source: epochs_per_level', 'steps per level'."""
    own = path.removeprefix(OF_SOURCE)
    key = own.partition(".")[2]
    name = key if SCHEMA.find(own) else key.replace("_", " ")
    return name if own == path else f"its source: {name}"


def _value(options: Options, path: str) -> str:
    return show(options[path]) if path in options else "none"


def _sizes(options: Options, images: tuple[int, int] | None) -> Options:
    """What the number of images settles, as options of its own."""
    training, test = images or (UNKNOWN, UNKNOWN)
    steps: int | str = UNKNOWN
    if images:
        trained = images[0] - options["dataset.validation_images"]
        batch = options["dataset.batch_size"]
        per_epoch = trained // batch if options["dataset.drop_last"] else -(-trained // batch)
        steps = per_epoch * options["experiment_params.epochs_per_level"]
    return {
        "dataset.training_images": training,
        "dataset.test_images": test,
        "experiment_params.steps_per_level": steps,
    }


# --- data and hardware -----------------------------------------------------------------------------------------------


def images_of(run: SavedRun) -> tuple[int, int] | None:
    """(training, test) images of a run's data set, those held out included; None if it has not recorded them."""
    for start in saved_starts(run.path):
        if images := start.get("images"):
            return images["training"] + images["validation"], images["test"]
    return DATASETS[run.dataset].images


def data_of(run: SavedRun) -> str:
    """A run's data set; of a tree of images also its folder, and the number of images."""
    spec = DATASETS[run.dataset]
    images = images_of(run)
    if images == spec.images and images:
        return run.dataset
    count = f"{images[0]:,} training and {images[1]:,} test images" if images else f"number of images {UNKNOWN}"
    root, loader = run.options.get("dataset.data_root"), run.options.get("dataset.loader", "auto")
    name = f"{run.dataset} {Path(root).name}" if root else run.dataset
    return f"{name}, {count}" + ("" if loader in ("auto", "memory") else f", loader {loader}")


def hardware_of(run: SavedRun) -> str:
    """What a run has recorded of the machine that it ran on, or the machines."""
    found = []
    for start in saved_starts(run.path):
        processes, devices = start.get("processes", 1), start.get("devices")
        if devices:
            found.append(f"{processes} x {devices[0]}")
        else:
            threads = processes * start.get("threads", 1)
            found.append(f"{start.get('processor', 'CPU')}, {threads} thread{'s' if threads > 1 else ''}")
    return " and ".join(dict.fromkeys(found)) or UNKNOWN
