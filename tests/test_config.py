"""harness_params: what is accepted, the shipped and the older files, notes, help."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from harness_params import SCHEMA, dump_yaml, load_config, make_config, unused_alone
from utils.config.checkers import Bool
from utils.config.options import Option
from utils.data.specs import DATASETS
from utils.pruning.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ORIGINALS = sorted((Path(__file__).parent / "original_layout").glob("*.yaml"))


def test_defaults_are_the_embedded_config():
    plain = load_config([])
    assert (plain.dataset.dataset_name, plain.model_params.model_name) == ("Digits", "lenet_300_100")
    assert plain.experiment_params.training_type == "imp"
    assert plain == make_config() == load_config(["--config", str(ROOT / "configs" / "digits_lenet.yaml")])
    assert plain.notes == ()


def test_yaml_is_not_guessed_at(in_file):
    cfg = load_config(
        in_file(
            "optimizer: {lr: 5e-4, weight_decay: 1E-4, warmup_epochs: .5, milestones: [0.5, 15]}\n"
            "experiment_params: {seed: 010, compile: on, expt_name: 2024-01-01, deterministic: 'true'}\n"
            "dataset: {os_cache: off, loader: ffcv, dataset_name: imagenet, drop_last: 1, batch_size: '64'}\n"
            "prune_params: {exclude: [fc*, 'conv1']}\n"
        )
    )
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.warmup_epochs) == (5e-4, 1e-4, 0.5)
    assert cfg.optimizer.milestones == (0.5, 15.0)
    assert (cfg.experiment_params.seed, cfg.experiment_params.compile) == (10, "on")
    assert cfg.experiment_params.expt_name == "2024-01-01"
    assert cfg.experiment_params.deterministic is True
    assert (cfg.dataset.os_cache, cfg.dataset.drop_last, cfg.dataset.batch_size) == ("off", True, 64)
    assert cfg.prune_params.exclude == ("fc*", "conv1")


@pytest.mark.parametrize(
    ("word", "value"),
    [("False", False), ("false", False), ("0", False), ("FALSE", False), ("True", True), ("true", True), ("1", True)],
)
def test_booleans_are_read_strictly(in_file, word, value):
    assert load_config([f"--experiment_params.channels_last={word}"]).experiment_params.channels_last is value
    assert load_config(["--experiment_params.channels_last", word]).experiment_params.channels_last is value
    assert load_config(in_file(f"experiment_params:\n  channels_last: {word}")).experiment_params.channels_last is value
    assert (
        load_config(in_file(f"experiment_params: {{channels_last: '{word}'}}")).experiment_params.channels_last is value
    )


@pytest.mark.parametrize(
    ("word", "value"),
    [("auto", "auto"), ("on", "on"), ("off", "off"), ("true", "on"), ("False", "off"), ("1", "on"), ("0", "off")],
)
def test_a_switch_takes_the_booleans_of_older_files(in_file, word, value):
    def graphs(words: list[str]) -> str:
        return load_config(words).experiment_params.cuda_graphs

    assert graphs([f"--experiment_params.cuda_graphs={word}"]) == value
    assert graphs(in_file(f"experiment_params:\n  cuda_graphs: {word}")) == value
    assert graphs(in_file(f"experiment_params: {{cuda_graphs: '{word}'}}")) == value
    if word.lower() in ("true", "false"):
        given = {"experiment_params": {"cuda_graphs": word == "true"}}
        assert make_config(given).experiment_params.cuda_graphs == value


def test_command_line_wins_and_leaves_the_rest(in_file):
    words = in_file("optimizer: {lr: 0.3, momentum: 0.8}\nprune_params: {prune_rate: 0.5}")
    cfg = load_config(
        [*words, "--optimizer.lr", "3", "--prune_params.exclude=fc*,conv1", "--optimizer.milestones=[5,10]"]
    )
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.prune_params.prune_rate) == (3.0, 0.8, 0.5)
    assert isinstance(cfg.optimizer.lr, float)
    assert cfg.prune_params.exclude == ("fc*", "conv1")
    assert cfg.optimizer.milestones == (5.0, 10.0)
    assert load_config([]) == make_config(), "nothing is kept between calls"
    assert load_config([*words, "--optimizer.lr=-1=-1"][:2]).optimizer.lr == 0.3


def test_environment_is_not_read(monkeypatch):
    for name in ("optimizer.lr", "OPTIMIZER.LR", "optimizer_lr", "lr"):
        monkeypatch.setitem(os.environ, name, "7")
    assert load_config([]).optimizer.lr == 0.1
    assert load_config(["--optimizer.lr=0.2"]).optimizer.lr == 0.2


def test_data_set_names_in_any_case():
    for name in DATASETS:
        assert make_config({"dataset": {"dataset_name": name.lower()}}).dataset.dataset_name == name


def test_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_config({"experiment_params": {"base_dir": "~/runs"}}).experiment_params.base_dir == f"{tmp_path}/runs"
    assert make_config({"dataset": {"data_root": tmp_path}}).dataset.data_root == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--prune_params.er_init=0.105"], "prune_params.er_init"),
        (["--prune_params.er_method=synflow", "--prune_params.er_init=1"], "prune_params.er_method"),
        (["--prune_params.rewind_epoch=10"], "prune_params.rewind_epoch"),
        (["--prune_params.rewind_step=10"], "prune_params.rewind_step"),
        (
            ["--experiment_params.training_type=wr", "--prune_params.rewind_step=100", "--prune_params.rewind_epoch=5"],
            "prune_params.rewind_epoch",
        ),
        (["--prune_params.synflow_rounds=5"], "prune_params.synflow_rounds"),
        (["--prune_params.score_batches=5"], "prune_params.score_batches"),
        (["--prune_params.score_dtype=float64"], "prune_params.score_dtype"),
        (["--optimizer.lr_min=0.01"], "optimizer.lr_min"),
        (["--optimizer.lr_min=0.01", "--optimizer.scheduler_type=Constant"], "optimizer.lr_min"),
        (["--optimizer.cooldown_epochs=2.5"], "optimizer.cooldown_epochs"),
        (["--optimizer.gamma=0.5", "--optimizer.scheduler_type=CosineLRWarmup"], "optimizer.gamma"),
        (["--dataset.num_workers=2"], "dataset.num_workers"),
        (["--dataset.os_cache=on"], "dataset.os_cache"),
        (["--dataset.data_root=/elsewhere"], "dataset.data_root"),
        (["--optimizer.no_decay_bn=true", "--optimizer.weight_decay=0"], "optimizer.no_decay_bn"),
        (["--dataset.download=false"], "dataset.download"),
        (["--optimizer.beta1=0.5"], "optimizer.beta1"),
        (["--optimizer.beta2=0.9"], "optimizer.beta2"),
        (["--optimizer.optimizer_name=adam", "--optimizer.momentum=0.5"], "optimizer.momentum"),
        (["--optimizer.optimizer_name=adamw", "--optimizer.nesterov=true"], "optimizer.nesterov"),
        (["--dist_params.nproc=2", "--dist_params.distributed=false"], "dist_params.nproc"),
        (["--dist_params.sync_bn=true", "--dist_params.nproc=1"], "dist_params.sync_bn"),
        (["--prune_params.prune_method=snip", "--prune_params.num_levels=1"], "prune_params.prune_method"),
        (["--prune_params.prune_rate=0.5", "--prune_params.num_levels=1"], "prune_params.prune_rate"),
        (["--experiment_params.training_type=lrr", "--prune_params.num_levels=1"], "experiment_params.training_type"),
        (["--experiment_params.save_every_epochs=20"], "experiment_params.save_every_epochs"),
        (
            [
                "--experiment_params.eval_every_epochs=2",
                "--experiment_params.epochs_per_level=1",
                "--optimizer.warmup_epochs=0",
            ],
            "experiment_params.eval_every_epochs",
        ),
        (
            ["--experiment_params.expt_name=a", "--experiment_params.resume_expt_name=b"],
            "experiment_params.expt_name",
        ),
    ],
)
def test_options_without_effect_are_noted(words, path):
    cfg = load_config(words)
    (note,) = [note for note in cfg.notes if "has no effect" in note.text]
    value = next(word for word in words if path in word).partition("=")[2]
    assert (note.option, f"{note.section}.") == (path, path[: path.index(".") + 1])
    assert str(note).startswith(f"{path}: {value} has no effect: ")
    assert cfg == make_config(cfg.to_dict()), "notes are no part of a config"
    assert "notes" not in cfg.to_dict()


def test_options_with_effect_are_not_noted():
    words = [
        "--prune_params.er_method=synflow",
        "--prune_params.er_init=0.5",
        "--prune_params.synflow_rounds=5",
        "--prune_params.prune_method=snip",
        "--prune_params.score_batches=2",
        "--experiment_params.training_type=wr",
        "--prune_params.rewind_epoch=3",
        "--optimizer.scheduler_type=TriangularSchedule",
        "--optimizer.lr_min=0.01",
        "--dataset.dataset_name=ImageFolder",
        "--dataset.num_workers=5",
    ]
    assert load_config(words).notes == ()


def test_a_dumped_config_is_quiet(in_file):
    """It sets every option, most of them at their defaults: no news."""
    assert load_config(in_file(dump_yaml(make_config()))).notes == ()


def test_original_layout_is_all_there():
    assert [path.stem for path in ORIGINALS] == [
        f"{s}_{t}" for s in ("cifar100", "cifar10", "imagenet") for t in ("lrr", "wr")
    ]


@pytest.mark.parametrize("path", ORIGINALS, ids=lambda path: path.stem)
def test_original_layout(path):
    cfg = load_config(["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    e = given["experiment_params"]
    assert cfg.model_params.model_name == "resnet18"
    assert cfg.dataset.dataset_name == given["dataset"]["dataset_name"]
    assert cfg.dataset.batch_size == given["dataset"]["batch_size"]
    assert cfg.dataset.num_workers == given["dataset"]["num_workers"]
    assert cfg.experiment_params.training_type == path.stem.split("_")[1]
    assert cfg.experiment_params.epochs_per_level == e["epochs_per_level"]
    assert cfg.prune_params.num_levels == {**given["prune_params"], **e}.get(
        "num_levels", given["prune_params"].get("num_levels")
    )
    assert cfg.prune_params.rewind_epoch == 10
    assert cfg.optimizer.lr == given["optimizer"]["lr"]
    assert cfg.optimizer.weight_decay == float(given["optimizer"]["weight_decay"])
    assert cfg.dist_params.port == int(given["dist_params"]["port"])
    assert "experiment_params.expt_setup: other has no effect (accepted for older files)" in map(str, cfg.notes)
    noted = {note.option for note in cfg.notes}
    assert ("prune_params.er_init" in noted) == ("er_init" in given["prune_params"])
    assert ("experiment_params.num_levels" in noted) == ("num_levels" in e)
    assert ("optimizer.num_workers" in noted) == ("num_workers" in given["optimizer"])
    assert load_config(["--config", str(path), "--prune_params.num_levels=2"]).prune_params.num_levels == 2


@pytest.mark.parametrize("training_type", ["imp", "wr", "lrr"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path, training_type):
    cfg = load_config(["--config", str(path), f"--experiment_params.training_type={training_type}"])
    assert cfg.experiment_params.training_type == training_type
    assert cfg.notes == ()
    assert path.name in path.read_text(), "the head comment says how to run it"
    dataset, model = re.sub(r"_fast$|_\d+ep_ffcv$", "", path.stem).split("_", 1)  # these end in how they train
    assert dataset == cfg.dataset.dataset_name.lower()
    assert cfg.model_params.model_name.startswith(model)


def test_shipped_configs_cover_the_list():
    names = {path.stem for path in CONFIGS}
    wanted = {f"{d}_{m}" for d in ("cifar10", "cifar100") for m in ("resnet18", "resnet20", "vgg16_bn")}
    wanted |= {"digits_lenet", "fashionmnist_lenet", "svhn_resnet18", "imagenet_resnet18", "imagenet_resnet50"}
    assert wanted <= names


@pytest.mark.parametrize(
    "words", [["--help"], ["-h"], ["--config", "missing.yaml", "--help"], ["--optimizer.lr=x", "-h"]]
)
def test_help_lists_every_option(capsys, words):
    with pytest.raises(SystemExit) as caught:
        load_config(words)
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for (section, key), option in SCHEMA.entries.items():
        at = [i for i, line in enumerate(lines) if line.startswith(f"  --{section}.{key}=VALUE ")]
        assert len(at) == 1, key
        assert option.checker.kind in lines[at[0]]
        assert "default " in lines[at[0]]
        assert option.unit in lines[at[0]]
        assert option.desc
        assert option.desc in lines[at[0] + 1]
        assert option.checker.help() in lines[at[0] + 2]


def test_faults_and_help_answer_at_once_without_torch():
    program = (
        "import sys\n"
        "from harness_params import load_config\n"
        "from utils.errors import ConfigError\n"
        "try:\n    load_config(['--optimizer.lr=x'])\n"
        "except ConfigError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "load_config(['--help'])\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("optimizer.lr: x is not allowed: a number > 0\n")
    assert seconds < 5  # 0.2 s on an idle machine


def test_harness_answers_at_once_without_torch():
    """Its own command line, on a path where torch cannot be imported."""
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('harness.py', run_name='__main__')"
    for words, status, output in [
        (["--help"], 0, "usage: "),
        (["--optimizer.lr=x"], 2, "harness: optimizer.lr: x is not"),
    ]:
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        assert (done.stdout + done.stderr).startswith(output)


def test_help_into_a_closed_pipe_is_no_failure():
    program = "from harness_params import load_config; load_config(['--help'])"
    done = subprocess.run(
        f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}',
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_declarations_pass_their_own_checks():
    for path, option in SCHEMA.entries.items():
        assert option.checker.check(option.default) == option.default, path
        assert len({key for _, key in SCHEMA.entries}) == len(SCHEMA.entries), "a key names one option"


def test_methods_offered_are_the_criteria_there_are():
    from utils.pruning_utils import CRITERIA

    choices = {key: SCHEMA.entries["prune_params", key].checker.choices for key in ("prune_method", "er_method")}
    assert sorted(choices["prune_method"]) == sorted(CRITERIA)
    assert sorted(choices["er_method"]) == sorted(["just dont", *CRITERIA])


def test_readme_names_the_paper_of_each_method():
    rows = [line for line in (ROOT / "configs" / "README.md").read_text().splitlines() if line.startswith("| `")]
    for name, method in METHODS.items():
        (row,) = [row for row in rows if f"`{name}`" in row.split(" | ")[0]]
        papers = row.split(" | ")[-1]
        assert all(paper in papers for paper in method.source.split(", ")), name


def test_data_sets_and_schedules_offered_are_those_of_the_readme():
    """Names that YAMLs in use have: none may go unnoticed."""
    assert set(SCHEMA.entries["dataset", "dataset_name"].checker.choices) == {
        *("Digits", "MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN", "ImageNet", "ImageFolder"),
    }
    assert set(SCHEMA.entries["optimizer", "scheduler_type"].checker.choices) == {
        *("MultiStepLRWarmup", "ImageNetLRDropsWarmup", "CosineLRWarmup"),
        *("LinearLRWarmup", "TriangularSchedule", "TrapezoidalSchedule", "OneCycleLR", "Constant"),
    }


def test_options_between_processes_are_noted_where_nproc_turns_out_to_be_one():
    words = ["--dist_params.wire=bf16", "--dist_params.sync_bn=true"]
    cfg = load_config(words)
    assert cfg.notes == ()  # with two GPUs they would count
    assert [note.option for note in unused_alone(cfg)] == ["dist_params.sync_bn", "dist_params.wire"]
    assert unused_alone(load_config([*words, "--dist_params.nproc=1"])) == []  # its own notes say so
    assert unused_alone(load_config([])) == []


def test_what_an_option_is_follows_from_its_declaration():
    """The sets as they were listed by hand before roles were declared."""
    from utils.config.effects import needs_levels, needs_processes
    from utils.plots.names import IGNORED
    from utils.runs.directory import FREE_ON_RESUME

    free = {
        "dataset": "num_workers data_root download os_cache train_beton val_beton",
        "prune_params": "num_levels target_density",
        "ticket_params": "source",
        "experiment_params": "base_dir expt_name resume_level resume_expt_name compile cuda_graphs channels_last "
        "save_every_epochs save_every_minutes deterministic plugins tracker",
        "dist_params": "threads distributed nproc backend address port sparse_allreduce timeout_minutes",
    }
    free_paths = {f"{section}.{key}" for section, keys in free.items() for key in keys.split()}
    assert free_paths == FREE_ON_RESUME
    assert free_paths | {
        "model_params.conv_type", "dataset.num_classes", "dataset.loader", "experiment_params.seed",
        "experiment_params.data_seed", "prune_params.save_steps",
    } == IGNORED  # fmt: skip
    assert set(needs_processes(SCHEMA)) == {
        f"dist_params.{key}" for key in ("address", "port", "sync_bn", "sparse_allreduce", "wire", "timeout_minutes")
    }
    assert set(needs_levels(SCHEMA)) == {
        "prune_params.prune_method", "prune_params.prune_rate", "prune_params.scope", "prune_params.layer_rates",
        "experiment_params.training_type",
    }  # fmt: skip


def test_options_are_declared_by_keyword():
    with pytest.raises(TypeError):
        Option(Bool(), False, "", "a meaning")
