"""configs/papers/: every file resolves, trains and prunes as it says; every published figure names its source."""

import csv
import math
import re
import statistics
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from harness_params import Config, load_config
from tests.conftest import ROOT
from utils.config.effects import without_effect
from utils.conv_type import density, masked_params
from utils.data.in_memory import load_in_memory
from utils.data.loaders import Data
from utils.data.specs import DATASETS, ArraySpec
from utils.distributed import Context
from utils.grids.grid import read_grid
from utils.pruning.methods import NO_METHOD, initial_density
from utils.runs.pruning import prune_level, pruning_of
from utils.training.setup import build_model
from utils.training.trainer import Trainer

PAPERS = sorted((ROOT / "configs" / "papers").glob("*.yaml"))
PUBLISHED = ROOT / "configs" / "papers" / "published.csv"
SECTION = re.compile(r"^\w+:$")
IMAGES = 8


def made_up(cfg: Config) -> Data:
    """Random images of the data set's shape and number of classes, two batches of them to train on."""
    spec = DATASETS[cfg.dataset.dataset_name]
    if not isinstance(spec, ArraySpec):
        assert cfg.dataset.dataset_name == "ImageNet"
        spec = ArraySpec(1000, (3, 224, 224), spec.mean, spec.std, spec.augment)
    channels, height, width = spec.image_shape
    draws = np.random.default_rng(0)

    def part(images: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = draws.integers(0, 256, (images, height, width, channels), dtype=np.uint8)
        return pixels, draws.integers(0, spec.num_classes, images)

    held_out = cfg.dataset.validation_images
    validation = part(held_out) if held_out else None
    return load_in_memory(cfg, Context(), spec, part(2 * cfg.dataset.batch_size), validation, part(IMAGES))


def density_by_layer(cfg: Config, model: nn.Module) -> float:
    """Of level 1 with scope layer: each layer keeps 1 minus its own rate, that of the last pattern that matches it."""
    p, kept, total = cfg.prune_params, 0, 0
    for name, param, _ in masked_params(model):
        layer = name.removesuffix(".weight")
        own = [rate for pattern, rate in (pair.rsplit(":", 1) for pair in p.layer_rates) if fnmatchcase(layer, pattern)]
        rate = float(own[-1]) if own else p.prune_rate
        kept, total = kept + round(param.numel() * (1 - rate)), total + param.numel()
    return kept / total


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_two_steps_and_two_levels(path):
    """The config as it stands, but for smaller batches and fewer rounds of SynFlow."""
    whole = load_config(["--config", str(path)])
    images = 4 if whole.dataset.dataset_name == "ImageNet" else IMAGES
    words = [f"--dataset.batch_size={images}", "--prune_params.synflow_rounds=2", "--prune_params.score_batches=1"]
    cfg = load_config(["--config", str(path), *words, "--dist_params.nproc=1", "--experiment_params.compile=off"])
    data = made_up(cfg)
    model = build_model(cfg, data, Context())
    prune_level(cfg, model, data, 0, 1.0)
    start = density(model)
    assert start == pytest.approx(initial_density(cfg.prune_params), abs=1e-6)
    before = {name: param.clone() for name, param in model.named_parameters()}
    trainer = Trainer(cfg, Context(), model, data)
    tally = trainer.new_tally()
    assert trainer.train_epoch(0, 0, tally, stop=lambda done: False)
    assert tally.step == 2 and all(param.isfinite().all() for param in model.parameters())
    assert any(not torch.equal(param, before[name]) for name, param in model.named_parameters())
    if cfg.prune_params.num_levels > 1:
        method, target = pruning_of(cfg, 1, start)
        assert method != NO_METHOD and target == pytest.approx(start * (1 - cfg.prune_params.prune_rate))
        if cfg.prune_params.scope == "layer":
            target = density_by_layer(cfg, model)
        prune_level(cfg, model, data, 1, start)
        assert density(model) == pytest.approx(target, abs=1e-6)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_options_name_their_sources(path):
    """Each source that a line cites stands in the header; lines without one are few, and none is a learning rate."""
    header, _, body = path.read_text().partition("\nmodel_params:")
    assert "python harness.py --config configs/papers/" + path.name in header
    sources = set(re.findall(r"^# \[([A-Z])\] ", header, re.MULTILINE))
    cited = set(re.findall(r"\[([A-Z])\]", body))
    assert cited and cited <= sources, cited - sources
    options = [line for line in body.splitlines() if line.startswith("  ")]
    told = [line for line in options if "#" in line]
    assert len(told) >= 0.75 * len(options)
    assert all("#" in line for line in options if line.split(":")[0].strip() in ("lr", "momentum", "weight_decay"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_no_line_is_without_effect_unless_a_variant_in_the_header_uses_it(path):
    text = path.read_text()
    cfg = load_config(["--config", str(path)])
    idle = [option for option, _ in without_effect(cfg, cfg.schema)]
    written = [option for option in idle if f"\n  {option.partition('.')[2]}: " in text]
    variants = re.findall(r"^# .*?((?:--\S+=\S+ ?)+)", text, re.MULTILINE)
    for option in written:
        used = False
        for variant in variants:
            words = [word for word in variant.split() if not word.endswith("=...")]
            other = load_config(["--config", str(path), *words])
            used |= option not in [idle for idle, _ in without_effect(other, other.schema)]
        assert used or option in ("prune_params.synflow_rounds", "prune_params.score_batches"), option


def rows() -> list[dict[str, str]]:
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_published_figures_have_a_source_and_a_plausible_value():
    assert len(rows()) > 300
    for row in rows():
        assert (PUBLISHED.parent / f"{row['config']}.yaml").exists(), row
        assert all(row[key] for key in ("paper", "config", "method", "density", "figure", "value", "source")), row
        assert 0 < float(row["density"]) <= 1, row
        if row["figure"] == "accuracy":
            assert 0 < float(row["value"]) <= 100, row
        else:  # a difference to another method of the same experiment, in points; or its sign alone
            assert row["figure"] in ("over dense", "over reinit"), row
            assert row["value"] in ("<0", "0", ">0") or 0 < float(row["value"]) < 10, row
        assert re.search(r"arXiv:\d{4}\.\d{5}|github\.com/\S+/\S+", row["source"]), row
        assert not row["spread"] or 0 <= float(row["spread"]) < 50, row
        assert (float(row["density"]) == 1) or row["method"] != "dense", row


def test_a_figure_is_listed_once():
    keys = [tuple(row[key] for key in ("config", "setting", "method", "figure", "density")) for row in rows()]
    assert len(keys) == len(set(keys))


def test_options_belong_to_a_setting_and_method():
    """All rows of one setting and method are one experiment."""
    found: dict[tuple[str, ...], set[str]] = {}
    for row in rows():
        found.setdefault((row["config"], row["setting"], row["method"]), set()).add(row["options"])
    assert all(len(options) == 1 for options in found.values())
    by_config: dict[str, list[str]] = {}
    for (config, _, method), options in found.items():
        if method != "dense":
            by_config.setdefault(config, []).extend(options)
    assert all(len(options) == len(set(options)) for options in by_config.values()), "two methods with the same options"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_each_config_has_published_figures_or_says_that_none_was_found(path):
    """Figures that the header quotes name their source in the same paragraph."""
    header, _, _ = path.read_text().partition("\nmodel_params:")
    if path.stem not in {row["config"] for row in rows()}:
        assert "accuracies were not found" in " ".join(header.replace("#", " ").split()), path
    sources = set(re.findall(r"^# \[([A-Z])\] ", header, re.MULTILINE))
    for paragraph in re.split(r"\n#\n", header):
        if "# Published" in paragraph:
            cited = set(re.findall(r"\[([A-Z])\]", paragraph))
            assert (cited and cited <= sources) or "arXiv:" in paragraph, paragraph


@pytest.mark.parametrize(
    ("key", "runs"),
    [
        (("tanaka2020_vgg16", "CIFAR-10", "synflow", "0.1"), [93.39, 93.24, 93.16]),
        (("tanaka2020_vgg16", "CIFAR-10", "snip", "0.01"), [89.43, 89.45, 88.57]),
        (("renda2020_resnet20", "", "wr", "0.209715"), [91.675, 91.9875, 91.5625]),
    ],
)
def test_means_of_the_authors_own_runs(key, runs):
    """Read from their files by eye; see the rows' sources."""
    row = next(r for r in rows() if tuple(r[k] for k in ("config", "setting", "method", "density")) == key)
    assert row["n"] == "3" and row["figure"] == "accuracy"
    assert float(row["value"]) == pytest.approx(statistics.mean(runs), abs=0.0051)
    assert float(row["spread"]) == pytest.approx(statistics.stdev(runs), abs=0.0051)


@pytest.mark.parametrize("network", ["lenet_fashionmnist", "conv2_cifar10_tenth"])
def test_grids_of_tickets_and_reinitialized_ones(network, tmp_path, monkeypatch):
    """The branches of a seed start from its own IMP run, at levels that it has."""
    monkeypatch.chdir(ROOT)
    grid = read_grid(f"configs/papers/grids/frankle2019_{network}.yaml", {"base_dir": str(tmp_path)})
    branches = [run for run in grid.runs if run.after]
    assert branches and all(run.after == f"imp_seed{run.cfg.experiment_params.seed}" for run in branches)
    levels = {run.name: run.cfg.prune_params.num_levels for run in grid.runs}
    assert all(run.cfg.ticket_params.level < levels[run.after] for run in branches)


def test_the_ablations_start_from_the_masks_they_change(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid("configs/papers/grids/frankle2021_ablations.yaml", {"base_dir": str(tmp_path)})
    runs = {run.name: run for run in grid.runs}
    assert len(runs) == 3 * 4 * 4
    for method in ("snip", "grasp", "synflow", "mag"):
        plain = runs[f"{method}_seed1"].cfg
        assert (plain.prune_params.er_method, plain.prune_params.er_init) == (method, 0.107374)
        inverted = runs[f"{method}_inverted_seed1"].cfg.prune_params
        assert inverted.invert_scores and (inverted.er_method, inverted.er_init) == (method, 0.107374)
        for change, mask, weights in (("shuffled", "shuffle_layer", "init"), ("reinitialized", "same", "reinit")):
            run = runs[f"{method}_{change}_seed1"]
            assert run.after == f"{method}_seed1"
            assert (run.cfg.ticket_params.mask, run.cfg.ticket_params.weights) == (mask, weights)


def test_the_grid_of_rewinding_holds_three_ways_of_three_seeds(tmp_path, monkeypatch):
    """Its levels 7 and 10 are the published densities next to 21% and 10.7%; its header tells its size."""
    monkeypatch.chdir(ROOT)
    path = "configs/papers/grids/renda2020_resnet20.yaml"
    grid = read_grid(path, {"base_dir": str(tmp_path)})
    assert {run.name for run in grid.runs} == {f"{way}_seed{seed}" for way in ("wr", "lrr", "imp") for seed in range(3)}
    published = {row["density"] for row in rows() if row["config"] == "renda2020_resnet20"}
    epochs = 0
    for run in grid.runs:
        e, p = run.cfg.experiment_params, run.cfg.prune_params
        assert run.name == f"{e.training_type}_seed{e.seed}"
        assert {f"{round((1 - p.prune_rate) ** level, 6):g}" for level in (7, 10)} <= published
        skipped = p.rewind_step / math.ceil(50_000 / run.cfg.dataset.batch_size) if e.training_type == "wr" else 0
        epochs += p.num_levels * e.epochs_per_level - (p.num_levels - 1) * skipped
    assert f"{len(grid.runs)} runs, {epochs:,.0f} epochs, {epochs * 0.05:.0f} million" in Path(path).read_text()
