"""plot_results --kind papers: published figures beside those of runs, and what differs. Figures worked out by hand."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from harness_params import load_config
from tests.conftest import ROOT
from tests.plot_helpers import groups_of, one_shot, write_run
from utils.plot_results import main
from utils.plots.papers import COLUMNS, TOLERANCE, paper_table
from utils.plots.published import PAPERS, Experiment, read_published

EXPERIMENTS = read_published()
OF_THE_RUN = ("experiment_params.seed", "experiment_params.expt_name", "prune_params.num_levels")
H100 = {"processes": 1, "threads": 8, "devices": ["NVIDIA H100 80GB HBM3"] * 2, "processor": "AMD EPYC"}


def paper_options(config: str, *words: str) -> dict:
    """The options of a paper's config, as `write_run` takes them."""
    cfg = load_config(["--config", str(PAPERS / f"{config}.yaml"), *words]).to_dict()
    flat = {f"{section}.{key}": value for section, keys in cfg.items() for key, value in keys.items()}
    return {path: value for path, value in flat.items() if path not in OF_THE_RUN}


def starts(run: Path, **entry) -> None:
    """Write what the run has noted of its start."""
    (run / "artifacts").mkdir(exist_ok=True)
    (run / "artifacts" / "environment.json").write_text(json.dumps([entry]))


def table(folder: Path, metric: str = "final", experiments=EXPERIMENTS) -> pd.DataFrame:
    return paper_table(groups_of(folder, "papers"), experiments, metric)[0]


def ticket_of(experiment: Experiment) -> dict:
    """What a run of the experiment notes of its ticket."""
    cfg = load_config(["--config", str(PAPERS / f"{experiment.config}.yaml"), *experiment.words])
    plain = [
        word for word in experiment.words if not word.startswith(("--ticket_params.", "--prune_params.num_levels"))
    ]
    source = load_config(["--config", str(PAPERS / f"{experiment.config}.yaml"), *plain])
    weights = "init" if cfg.ticket_params.weights == "auto" else cfg.ticket_params.weights
    ticket = {"level": 3, "step": -1, "mask": cfg.ticket_params.mask, "weights": weights, "first_epoch": 0}
    return ticket | {"seed": 0, "options": source.to_dict(), "ticket": None}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: f"{e.config} {e.setting} {e.method}")
def test_a_run_of_the_papers_own_config_differs_in_nothing(tmp_path, experiment):
    """The row's config and options are the run's: it is compared with all figures of its density, and no other."""
    figure = next((f for f in experiment.figures if f.density < 1), experiment.figures[0])
    options = paper_options(experiment.config, *experiment.words)
    ticketed = bool(options["ticket_params.source"])
    once = options["prune_params.er_method"] != "just dont"
    if once:
        options["prune_params.er_init"] = figure.density
    densities = [figure.density] if once or ticketed else sorted({1.0, figure.density}, reverse=True)
    run = write_run(tmp_path, "run", [50.0] * len(densities), densities, **options)
    starts(run, **H100, **({"ticket": ticket_of(experiment)} if ticketed else {}))
    if figure.figure != "accuracy" and ticketed:  # a difference to the dense network: it must have been run
        write_run(tmp_path, "dense", [50.0, 50.0], [1.0, 0.9], **paper_options(experiment.config))
    own = table(tmp_path).query("config == @experiment.config and setting == @experiment.setting")
    own = own[(own["method"] == experiment.method) & (own["density"] == figure.density)]
    assert list(own["published"]) == [f.value for f in experiment.figures if f.density == figure.density]
    assert set(own["ours"]) == {50.0 if figure.figure == "accuracy" else 0.0}
    assert set(own["hardware"]) == {"1 x NVIDIA H100 80GB HBM3"}
    epoch = f"accuracy at last epoch ({figure.at})"
    assert set(own["differs"]) == {epoch if figure.at not in ("", "last epoch") else ""}


def test_rows_by_hand(tmp_path):
    """Three seeds of LeNet: mean and deviation; dense once; a density that no level is near has no row."""
    options = paper_options("frankle2019_lenet")
    for seed, accuracies in enumerate([[98.0, 98.4, 97.0], [98.2, 98.4, 97.5], [98.4, 98.7, 98.0]]):
        run = write_run(tmp_path, f"imp_{seed}", accuracies, [1.0, 0.108, 0.0352], seed, **options)
        starts(run, processes=1, threads=1, devices=[], processor="AMD EPYC")
    found = table(tmp_path)
    assert list(found.columns) == list(COLUMNS) and set(found["config"]) == {"frankle2019_lenet"}
    rows = found[["method", "figure", "density", "published", "our_density", "ours", "ours_std", "ours_n"]]
    assert rows.to_dict("split")["data"] == [
        ["dense", "accuracy", 1.0, "98.0", 1.0, 98.2, 0.2, 3],
        ["imp", "accuracy", 0.107, "98.3", 0.108, 98.5, 0.173, 3],
        ["imp", "over dense", 0.036, "0", 0.0352, -0.7, 0.3, 3],  # -1.0, -0.7, -0.4
    ]
    assert set(found["hardware"]) == {"AMD EPYC, 1 thread"} and set(found["data"]) == {"MNIST"}
    assert list(table(tmp_path, "max")["ours"]) == [99.2, 99.5, -0.7]


def test_what_differs_is_read_from_both_configs(tmp_path):
    changed = {"dataset.dataset_name": "FashionMNIST", "dataset.validation_images": 0, "optimizer.lr": 0.001,
               "experiment_params.epochs_per_level": 10, "prune_params.prune_rate": 0.3}  # fmt: skip
    write_run(tmp_path, "imp", [88.0, 89.0], [1.0, 0.107], **paper_options("frankle2019_lenet") | changed)
    dense, imp = table(tmp_path).to_dict("records")
    told = ["dataset_name FashionMNIST (MNIST)", "validation_images 0 (5000)", "epochs_per_level 10 (55)",
            "lr 0.001 (0.0012)", "steps per level 10000 (50435)"]  # fmt: skip
    assert dense["differs"].split("; ") == told
    assert imp["differs"].split("; ") == [told[0], told[1], "prune_rate 0.3 (0.2)", *told[2:]]
    assert dense["data"] == "FashionMNIST" and dense["hardware"] == "not recorded"


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "older run"])
def test_fewer_images_from_a_tree_are_told(tmp_path, noted):
    tree = {
        "dataset.dataset_name": "ImageFolder",
        "dataset.data_root": "/data/cifar10-jpeg",
        "dataset.loader": "memory",
    }
    run = write_run(tmp_path, "imp", [60.0, 61.0], [1.0, 0.046], **paper_options("frankle2019_conv2") | tree)
    images = {"images": {"training": 4500, "validation": 500, "test": 2000}} if noted else {}
    starts(run, **H100, **images)
    row = table(tmp_path).iloc[0]
    assert (row["figure"], row["ours"]) == ("over dense", 1.0)
    told = row["differs"].split("; ")
    assert told[0] == "dataset_name ImageFolder (CIFAR10)"
    if noted:
        assert told[1:4] == ["training images 5000 (50000)", "test images 2000 (10000)", "steps per level 2016 (20016)"]
        assert row["data"] == "ImageFolder cifar10-jpeg, 5,000 training and 2,000 test images"
    else:
        assert told[1] == "training images not recorded (50000)"
        assert row["data"] == "ImageFolder cifar10-jpeg, number of images not recorded"


def test_the_nearest_setting_is_chosen_and_equally_near_ones_are_all_shown(tmp_path):
    """ResNet-20 at three rates: the paper's low one; one between its low and its standard one."""
    options = paper_options("frankle2019_resnet20", "--optimizer.warmup_epochs=0")
    write_run(tmp_path / "low", "imp", [89.0, 88.0], [1.0, 0.167], **options | {"optimizer.lr": 0.01})
    low = table(tmp_path / "low")
    assert set(low["setting"]) == {"low"} and set(low["differs"]) == {""}
    write_run(tmp_path / "between", "imp", [89.0, 88.0], [1.0, 0.167], **options | {"optimizer.lr": 0.02})
    between = table(tmp_path / "between")
    assert set(between["setting"]) == {"low", "standard"}
    assert set(between["differs"]) == {"lr 0.02 (0.01)", "lr 0.02 (0.1)"}


def test_a_difference_to_another_method_is_taken_seed_by_seed(tmp_path):
    options = paper_options("frankle2019_lenet")
    reinit = next(e for e in EXPERIMENTS if (e.config, e.method) == ("frankle2019_lenet", "reinit"))
    ticketed = paper_options("frankle2019_lenet", *reinit.words)
    for seed, (imp, again) in enumerate([(98.0, 97.0), (98.5, 98.0)]):
        write_run(tmp_path, f"imp_{seed}", [98.0, imp], [1.0, 0.211], seed, **options)
        starts(write_run(tmp_path, f"again_{seed}", [again], [0.211], seed, **ticketed), ticket=ticket_of(reinit))
    found = table(tmp_path).set_index(["method", "figure"])
    row = found.loc["imp", "over reinit"]
    assert (row["published"], row["ours"], row["ours_std"], row["ours_n"]) == ("0.5", 0.75, 0.354, 2)
    assert found.loc["reinit", "over dense"]["ours"] == -0.5


@pytest.mark.parametrize(("density", "near"), [(0.107 * (0.99 + TOLERANCE), True), (0.107 * (1.01 + TOLERANCE), False)])
def test_a_density_is_near_within_the_tolerance(tmp_path, density, near):
    write_run(tmp_path, "imp", [98.0, 98.0], [1.0, density], **paper_options("frankle2019_lenet"))
    assert (0.107 in list(table(tmp_path)["density"])) == near


def test_command_line(tmp_path, capsys):
    """Two data sets in one table; Markdown on stdout, CSV in the file."""
    write_run(tmp_path, "lenet", [98.0, 98.4], [1.0, 0.107], **paper_options("frankle2019_lenet"))
    wr = paper_options("renda2020_resnet20")
    run = write_run(tmp_path, "wr", [91.5, 92.0, 91.8], [1.0, 0.21, 0.107], **wr)
    starts(run, **H100)
    one_shot(tmp_path, "snip", 0.5, 90.0, **{path: wr[path] for path in wr if path.startswith(("model", "dataset"))})
    out = tmp_path / "papers.csv"
    assert main([str(tmp_path), "--kind", "papers", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    head, _, *lines = printed.out.splitlines()
    assert printed.err == "plot_results: note: no published figure near a density of: SNIP\n"
    assert head == "Ours: test accuracy, last epoch of each level; mean ± standard deviation over n seeds."
    assert len(lines) == 2 + 5 == 2 + len(pd.read_csv(out))
    assert lines[-1] == (
        "| Renda et al. 2020 | `renda2020_resnet20`, wr | 10.7% | 90.96 ± 0.10, n = 3 | 91.80, n = 1 | "
        "CIFAR10; 1 x NVIDIA H100 80GB HBM3 | nothing |"
    )
    assert main([str(tmp_path), "--kind", "papers", "--paper", "frankle2019_lenet"]) == 0
    assert "renda2020" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--paper", "frankle2019"], "--paper: 'frankle2019' is not allowed: one of frankle2019_lenet,"),
        (["--paper", "renda2020_resnet20"], "no published figure of the network, the method and a density within 12%"),
        (["--density", "0.1"], "--density: only with --kind layers or curves or table (it is papers)"),
        (["--out", "x.png"], "--out: x.png: ends in none of .csv"),
        (["--metric", "best_val"], "needs runs with dataset.validation_images"),
    ],
)
def test_faults(tmp_path, capsys, words, fault):
    write_run(tmp_path, "lenet", [98.0, 98.4], [1.0, 0.107], **paper_options("frankle2019_lenet"))
    assert main([str(tmp_path), "--kind", "papers", *words]) == 2
    assert fault in capsys.readouterr().err.splitlines()[-1]


def test_a_table_has_no_options_and_figures_no_papers(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text("run\n")
    assert main([str(tmp_path / "runs.csv"), "--kind", "papers"]) == 2
    assert "--kind papers needs run directories: a table holds no options" in capsys.readouterr().err
    assert main([str(tmp_path), "--paper", "frankle2019_lenet", "--out", str(tmp_path / "x.png")]) == 2
    assert "--paper: only with --kind papers" in capsys.readouterr().err


def test_a_real_run(fork, tmp_path, capsys):
    """LeNet on Digits from the paper's config: its own records give data, hardware and what differs."""
    config = {f"{path}": value for path, value in paper_options("frankle2019_lenet").items()}
    kept = (
        "dataset.batch_size",
        "prune_params.scope",
        "optimizer.optimizer_name",
        "optimizer.lr",
        "optimizer.weight_decay",
    )
    options = {path: config[path] for path in kept} | {
        "optimizer.scheduler_type": "Constant",
        "optimizer.warmup_epochs": 0,
    }
    options |= {"dataset.validation_images": 100, "experiment_params.epochs_per_level": 1, "prune_params.num_levels": 2}
    fork("imp", **options, **{"prune_params.layer_rates": "[fc3:0.1]"})
    assert main([str(tmp_path / "imp"), "--kind", "papers"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[4:]
    assert "| `frankle2019_lenet`, dense | 100% | 98.0 ± 0.2, n = 3 |" in line and "| Digits; " in line
    assert "not recorded" not in line and "1 thread" in line
    for told in ("training images 1437 (60000)", "test images 360 (10000)", "steps per level 23 (50435)"):
        assert told in line


def test_the_shipped_table_is_that_of_the_shipped_runs():
    """assets/papers.csv: each published figure stands in published.csv, ours follow from the table of all runs."""
    shipped = pd.read_csv(ROOT / "assets" / "papers.csv")
    with (PAPERS / "published.csv").open(newline="") as file:
        published = {
            (r["config"], r["setting"], r["method"], r["figure"], float(r["density"])): (r["value"], r["source"])
            for r in csv.DictReader(file)
        }
    assert list(shipped.columns) == list(COLUMNS) and len(shipped)
    for row in shipped.astype(object).fillna("").to_dict("records"):
        key = (row["config"], row["setting"], row["method"], row["figure"], row["density"])
        value, source = published[key]
        assert (str(row["published"]), row["source"]) == (value, source)
        assert abs(row["our_density"] / row["density"] - 1) <= TOLERANCE and row["data"] and row["hardware"]
    runs = pd.read_csv(ROOT / "assets" / "frankle2019_lenet_fashionmnist.csv")
    lenet = shipped[shipped["config"] == "frankle2019_lenet"]
    names = {"dense": "IMP", "imp": "IMP", "reinit": "IMP, reinit"}
    names["random, layer-wise shares of imp"] = "IMP, layers shuffled"

    def accuracy(method: str, density: float) -> pd.Series:
        own = runs[(runs["method"] == names[method]) & (abs(runs["density"] - density) < 1e-6)]
        return own.set_index("seed")["final_test_acc"]

    for row in lenet.to_dict("records"):
        values, figure = accuracy(row["method"], row["our_density"]), row["figure"]
        if figure != "accuracy":
            other = figure.removeprefix("over ")
            values = values - accuracy(other, 1.0 if other == "dense" else row["our_density"])
        assert (row["ours"], row["ours_std"]) == (round(values.mean(), 3), round(values.std(), 3))
        assert row["ours_n"] == len(values) == 3 and "dataset_name FashionMNIST (MNIST)" in row["differs"]
