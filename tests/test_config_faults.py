"""harness_params: every bad config is refused, naming the option, the value and what is allowed."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness_params import SCHEMA, load_config, make_config
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = str(ROOT / "configs" / "digits_lenet.yaml")
OPTIONS = [".".join(path) for path in SCHEMA.entries]


def faults_of(words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(words)
    faults = caught.value.faults
    assert faults
    assert all("\n" not in line for line in faults), "one line per fault"
    assert str(caught.value) == "\n".join(faults)
    return faults


BAD_VALUES = [  # YAML section body, the option at fault, the value as the fault shows it, words of what is allowed
    ("optimizer: {lr: 0}", "optimizer.lr", "0", "> 0"),
    ("optimizer: {lr: -0.1}", "optimizer.lr", "-0.1", "> 0"),
    ("optimizer: {lr: fast}", "optimizer.lr", "fast", "a number"),
    ("optimizer: {lr: .nan}", "optimizer.lr", ".nan", "a number"),
    ("optimizer: {lr: nan}", "optimizer.lr", "nan", "a number"),
    ("optimizer: {lr: .inf}", "optimizer.lr", ".inf", "a number"),
    ("optimizer: {lr: inf}", "optimizer.lr", "inf", "a number"),
    ("optimizer: {lr: 1e999}", "optimizer.lr", "1e999", "a number"),
    ("optimizer: {lr: 1_0}", "optimizer.lr", "1_0", "a number"),
    ("optimizer: {lr: true}", "optimizer.lr", "true", "a number"),
    ("optimizer: {lr: [0.1]}", "optimizer.lr", "[0.1]", "a number"),
    ("optimizer: {lr: {peak: 0.1}}", "optimizer.lr", "peak", "a number"),
    ("optimizer: {momentum: 1.0}", "optimizer.momentum", "1.0", "< 1"),
    ("optimizer: {optimizer_name: adagrad}", "optimizer.optimizer_name", "adagrad", "sgd, adam, adamw"),
    ("optimizer: {optimizer_name: adam, beta1: 1.0}", "optimizer.beta1", "1.0", "< 1"),
    ("optimizer: {beta2: -0.1}", "optimizer.beta2", "-0.1", ">= 0"),
    ("optimizer: {weight_decay: -1e-4}", "optimizer.weight_decay", "-1e-4", ">= 0"),
    ("optimizer: {warmup_epochs: -1}", "optimizer.warmup_epochs", "-1", ">= 0"),
    (
        "optimizer: {scheduler_type: CosineLRWarmUp}",
        "optimizer.scheduler_type",
        "CosineLRWarmUp",
        "mean CosineLRWarmup?",
    ),
    ("optimizer: {label_smoothing: 1}", "optimizer.label_smoothing", "1", "< 1"),
    ("optimizer: {gamma: 0}", "optimizer.gamma", "0", "> 0"),
    ("optimizer: {grad_clip: -1}", "optimizer.grad_clip", "-1", ">= 0"),
    ("optimizer: {milestones: [0.5, x]}", "optimizer.milestones", "[0.5, x]", "a list"),
    ("optimizer: {milestones: [0, 5]}", "optimizer.milestones", "[0, 5]", "> 0"),
    ("optimizer: {milestones: '0.5,'}", "optimizer.milestones", "0.5,", "a list"),
    ("optimizer: {nesterov: 'no'}", "optimizer.nesterov", "no", "true or false"),
    ("experiment_params: {channels_last: yes}", "experiment_params.channels_last", "yes", "true or false"),
    ("experiment_params: {deterministic: 2}", "experiment_params.deterministic", "2", "true or false"),
    ("experiment_params: {deterministic: 1.0}", "experiment_params.deterministic", "1.0", "true or false"),
    ("dist_params: {distributed: 'off'}", "dist_params.distributed", "off", "true or false"),
    ("experiment_params: {epochs_per_level: 3.9}", "experiment_params.epochs_per_level", "3.9", "a whole number"),
    ("experiment_params: {epochs_per_level: 3.0}", "experiment_params.epochs_per_level", "3.0", "a whole number"),
    ("experiment_params: {epochs_per_level: 0}", "experiment_params.epochs_per_level", "0", ">= 1"),
    ("experiment_params: {epochs_per_level: true}", "experiment_params.epochs_per_level", "true", "a whole number"),
    ("experiment_params: {seed: -1}", "experiment_params.seed", "-1", "0..4294967295"),
    ("experiment_params: {seed: 4294967296}", "experiment_params.seed", "4294967296", "0..4294967295"),
    ("experiment_params: {seed: 0x10}", "experiment_params.seed", "0x10", "a whole number"),
    ("experiment_params: {seed: 1:30}", "experiment_params.seed", "1:30", "a whole number"),
    ("experiment_params: {seed: ٣}", "experiment_params.seed", "٣", "a whole number"),
    ("experiment_params: {training_type: wrr}", "experiment_params.training_type", "wrr", "imp, wr, lrr"),
    ("experiment_params: {training_type: IMP}", "experiment_params.training_type", "IMP", "did you mean imp?"),
    ("experiment_params: {precision: float16}", "experiment_params.precision", "float16", "fp16"),
    ("experiment_params: {compile: true}", "experiment_params.compile", "true", "auto, on, off"),
    ("experiment_params: {eval_every_epochs: 0}", "experiment_params.eval_every_epochs", "0", ">= 1"),
    ("experiment_params: {save_every_minutes: -1}", "experiment_params.save_every_minutes", "-1", ">= 0"),
    ("experiment_params: {base_dir: ''}", "experiment_params.base_dir", "''", "a path"),
    ("experiment_params: {expt_name: ../x}", "experiment_params.expt_name", "../x", "no /"),
    ("experiment_params: {expt_name: a/b}", "experiment_params.expt_name", "a/b", "no /"),
    ("experiment_params: {expt_name: 'a\\b'}", "experiment_params.expt_name", "a\\b", "\\"),
    ("experiment_params: {expt_name: ..}", "experiment_params.expt_name", "..", "no leading dot"),
    ("experiment_params: {expt_name: .hidden}", "experiment_params.expt_name", ".hidden", "no leading dot"),
    ("experiment_params: {expt_name: '   '}", "experiment_params.expt_name", "'   '", "no spaces around"),
    ('experiment_params: {expt_name: "a\\nb"}', "experiment_params.expt_name", "'a\\nb'", "printable"),
    (f"experiment_params: {{expt_name: {'x' * 201}}}", "experiment_params.expt_name", "xxx", "200 bytes"),
    (f"experiment_params: {{expt_name: {'é' * 101}}}", "experiment_params.expt_name", "é", "200 bytes"),
    ("experiment_params: {expt_name: None}", "experiment_params.expt_name", "None", '""'),
    ("experiment_params: {resume_expt_name: [a]}", "experiment_params.resume_expt_name", "[a]", "directory name"),
    ("model_params: {model_name: ''}", "model_params.model_name", "''", "a word"),
    ("model_params: {model_name: resnet 18}", "model_params.model_name", "resnet 18", "without spaces"),
    ("model_params: {conv_type: Conv2d}", "model_params.conv_type", "Conv2d", "ConvMask"),
    ("dataset: {dataset_name: CIFAR11}", "dataset.dataset_name", "CIFAR11", "did you mean CIFAR10?"),
    ("dataset: {dataset_name: tinyimages}", "dataset.dataset_name", "tinyimages", "FashionMNIST"),
    ("dataset: {num_classes: 1}", "dataset.num_classes", "1", ">= 2, or 0"),
    ("dataset: {batch_size: 0}", "dataset.batch_size", "0", ">= 1"),
    ("dataset: {num_workers: -1}", "dataset.num_workers", "-1", "0..1024"),
    ("dataset: {loader: dali}", "dataset.loader", "dali", "torchvision"),
    ("dataset: {augment: mixup}", "dataset.augment", "mixup", "crop_flip"),
    ("dataset: {resolution: 4}", "dataset.resolution", "4", "8..1024, or 0"),
    ("dataset: {eval_resolution: 4096}", "dataset.eval_resolution", "4096", "8..1024, or 0"),
    ("dataset: {os_cache: true}", "dataset.os_cache", "true", "auto, on, off"),
    ("prune_params: {prune_rate: 0}", "prune_params.prune_rate", "0", "> 0 and < 1"),
    ("prune_params: {prune_rate: 1}", "prune_params.prune_rate", "1", "> 0 and < 1"),
    ("prune_params: {prune_rate: 20%}", "prune_params.prune_rate", "20%", "a number"),
    ("prune_params: {prune_method: magnitude}", "prune_params.prune_method", "magnitude", "did you mean mag?"),
    ("prune_params: {num_levels: 0}", "prune_params.num_levels", "0", "1..10000"),
    ("prune_params: {er_method: just do}", "prune_params.er_method", "just do", "just dont"),
    ("prune_params: {er_init: 0}", "prune_params.er_init", "0", "<= 1"),
    ("prune_params: {er_init: 1.5}", "prune_params.er_init", "1.5", "<= 1"),
    ("prune_params: {rewind_epoch: -1}", "prune_params.rewind_epoch", "-1", ">= 0"),
    ("prune_params: {rewind_step: 1.5}", "prune_params.rewind_step", "1.5", "a whole number >= 0"),
    ("prune_params: {save_steps: [0, -1]}", "prune_params.save_steps", "[0, -1]", "each entry: a whole number >= 0"),
    ("prune_params: {exclude: [fc, '']}", "prune_params.exclude", "fc", "a list"),
    ("prune_params: {synflow_rounds: 0}", "prune_params.synflow_rounds", "0", ">= 1"),
    ("prune_params: {score_dtype: bfloat16}", "prune_params.score_dtype", "bfloat16", "float64"),
    ("dist_params: {port: 65536}", "dist_params.port", "65536", "0..65535"),
    ("dist_params: {port: -1}", "dist_params.port", "-1", "0..65535"),
    ("dist_params: {nproc: -1}", "dist_params.nproc", "-1", "0..1024"),
    ("dist_params: {backend: mpi}", "dist_params.backend", "mpi", "nccl"),
    ("dist_params: {timeout_minutes: 0}", "dist_params.timeout_minutes", "0", "> 0"),
]


@pytest.mark.parametrize(("text", "path", "value", "allowed"), BAD_VALUES, ids=[case[0][:60] for case in BAD_VALUES])
def test_bad_value(in_file, text, path, value, allowed):
    (line,) = faults_of(in_file(text))
    given_as, _, meant = line.partition(" is not allowed: ")
    assert given_as.startswith(f"{path}: ")
    assert value in given_as.removeprefix(f"{path}: ")
    assert allowed in meant


BAD_TOGETHER = [  # several options, each fine alone
    (
        {"experiment_params": {"training_type": "wr", "epochs_per_level": 5}, "prune_params": {"rewind_epoch": 10}},
        "prune_params.rewind_epoch",
        "10",
        "(5)",
    ),
    (
        {"experiment_params": {"training_type": "wr"}, "prune_params": {"rewind_epoch": 0}},
        "prune_params.rewind_epoch",
        "0",
        "1 <= rewind_epoch",
    ),
    (
        {"experiment_params": {"training_type": "wr"}, "prune_params": {"rewind_epoch": 20}},
        "prune_params.rewind_epoch",
        "20",
        "(20)",
    ),
    ({"prune_params": {"save_steps": [0, 5, 5]}}, "prune_params.save_steps", "[0, 5, 5]", "later than the one before"),
    ({"prune_params": {"save_steps": [7, 5]}}, "prune_params.save_steps", "[7, 5]", "later than the one before"),
    ({"dataset": {"dataset_name": "CIFAR100", "num_classes": 10}}, "dataset.num_classes", "10", "write 100"),
    ({"dataset": {"num_classes": 100}}, "dataset.num_classes", "100", "Digits has 10"),
    ({"prune_params": {"prune_rate": 0.9, "num_levels": 12}}, "prune_params.num_levels", "12", "1.0e-11"),
    ({"dataset": {"dataset_name": "ImageNet", "loader": "memory"}}, "dataset.loader", "memory", "torchvision"),
    ({"dataset": {"dataset_name": "CIFAR10", "loader": "ffcv"}}, "dataset.loader", "ffcv", "dataset.train_beton"),
    ({"dataset": {"train_beton": "a.beton"}}, "dataset.train_beton", "a.beton", "only with dataset.loader ffcv"),
    ({"dataset": {"end_resolution": 192}}, "dataset.end_resolution", "192", "only with dataset.loader ffcv"),
    (
        {"dataset": {"dataset_name": "ImageNet", "loader": "ffcv", "start_resolution": 160}},
        "dataset.end_resolution",
        "0",
        "together",
    ),
    (
        {"dataset": {"dataset_name": "ImageNet", "loader": "ffcv", "start_resolution": 224, "end_resolution": 160}},
        "dataset.start_resolution",
        "224",
        "160",
    ),
    ({"dist_params": {"nproc": 4}, "dataset": {"batch_size": 3}}, "dataset.batch_size", "3", ">= 4"),
    ({"experiment_params": {"resume_level": 2}}, "experiment_params.resume_level", "2", "resume_expt_name"),
    (
        {"experiment_params": {"resume_level": 12, "resume_expt_name": "a"}},
        "experiment_params.resume_level",
        "12",
        "num_levels (12)",
    ),
    ({"optimizer": {"milestones": [10, 5]}}, "optimizer.milestones", "[10.0, 5.0]", "later"),
    ({"optimizer": {"milestones": [0.5, 10]}}, "optimizer.milestones", "[0.5, 10.0]", "10, 10"),
    ({"optimizer": {"milestones": [10, 20]}}, "optimizer.milestones", "20", "before the end"),
    (
        {"optimizer": {"milestones": [0.5], "scheduler_type": "CosineLRWarmup"}},
        "optimizer.milestones",
        "[0.5]",
        "CosineLRWarmup",
    ),
    ({"optimizer": {"warmup_epochs": 20}}, "optimizer.warmup_epochs", "20", "(20)"),
    (
        {"optimizer": {"scheduler_type": "TrapezoidalSchedule", "warmup_epochs": 5, "cooldown_epochs": 16}},
        "optimizer.cooldown_epochs",
        "16",
        "fit into experiment_params.epochs_per_level (20)",
    ),
    (
        {"optimizer": {"scheduler_type": "TrapezoidalSchedule", "warmup_epochs": 17}},
        "optimizer.cooldown_epochs",
        "0",
        "a fifth",
    ),
    ({"experiment_params": {"cycles": 3}}, "experiment_params.cycles", "3", "a divisor of"),
    (
        {"experiment_params": {"cycles": 4}, "optimizer": {"warmup_epochs": 5}},
        "optimizer.warmup_epochs",
        "5",
        "epochs_per_level / cycles (5)",
    ),
    (
        {"experiment_params": {"cycles": 2}, "optimizer": {"milestones": [10]}},
        "optimizer.milestones",
        "[10.0]",
        "epochs_per_level / cycles is 10",
    ),
    (
        {"prune_params": {"target_density": 0.1, "num_levels": 5}},
        "prune_params.num_levels",
        "5",
        "0.1, which takes 12 levels",
    ),
    (
        {"prune_params": {"target_density": 0.1, "scope": "layer", "layer_rates": ["fc:0.1"]}},
        "prune_params.target_density",
        "0.1",
        "0 with layer_rates",
    ),
    ({"prune_params": {"target_density": 1e-10}}, "prune_params.target_density", "1e-10", "at least 1e-9"),
    (
        {"prune_params": {"target_density": 0.1, "prune_rate": 1e-5}},
        "prune_params.target_density",
        "0.1",
        "at most 10000",
    ),
    (
        {"prune_params": {"target_density": 0.1}, "ticket_params": {"source": "a"}},
        "prune_params.target_density",
        "0.1",
        "write prune_params.num_levels",
    ),
    ({"optimizer": {"lr_min": 0.2}}, "optimizer.lr_min", "0.2", "0.1"),
    ({"optimizer": {"nesterov": True, "momentum": 0}}, "optimizer.nesterov", "true", "momentum > 0"),
    (
        {"experiment_params": {"cuda_graphs": True}, "dist_params": {"nproc": 2}},
        "experiment_params.cuda_graphs",
        "on",
        "several processes (dist_params.nproc is 2)",
    ),
    (
        {"experiment_params": {"cuda_graphs": "on", "precision": "fp16"}},
        "experiment_params.cuda_graphs",
        "on",
        "precision fp16",
    ),
    (
        {
            "experiment_params": {"cuda_graphs": "on"},
            "dataset": {"dataset_name": "ImageFolder", "loader": "torchvision"},
        },
        "experiment_params.cuda_graphs",
        "on",
        "held in memory",
    ),
    (
        {"experiment_params": {"num_levels": 3}, "prune_params": {"num_levels": 4}},
        "experiment_params.num_levels",
        "3",
        "keep prune_params.num_levels",
    ),
]


@pytest.mark.parametrize(("options", "path", "value", "allowed"), BAD_TOGETHER, ids=lambda x: str(x)[:50])
def test_bad_together(in_file, options, path, value, allowed):
    (line,) = faults_of(in_file(yaml.safe_dump(options)))
    given_as, _, meant = line.partition(" is not allowed: ")
    assert given_as.startswith(f"{path}: ")
    assert value in given_as.removeprefix(f"{path}: ")
    assert allowed in meant
    with pytest.raises(ConfigError) as caught:
        make_config(options)
    assert caught.value.faults == [line]


BAD_PYTHON = [  # values that only make_config can be given
    ("experiment_params", "seed", True, "true"),
    ("experiment_params", "seed", 3.0, "3.0"),
    ("experiment_params", "seed", None, "null"),
    ("optimizer", "lr", True, "true"),
    ("optimizer", "lr", float("nan"), "nan"),
    ("optimizer", "lr", float("inf"), "inf"),
    ("optimizer", "lr", 10**400, "1000"),
    ("optimizer", "nesterov", 1.0, "1.0"),
    ("optimizer", "nesterov", 2, "2"),
    ("optimizer", "milestones", True, "true"),
    ("model_params", "model_name", 18, "18"),
    ("dataset", "data_root", 3, "3"),
    ("prune_params", "exclude", {"fc": 1}, "fc"),
]


@pytest.mark.parametrize(("section", "key", "value", "shown"), BAD_PYTHON)
def test_bad_python_value(section, key, value, shown):
    with pytest.raises(ConfigError) as caught:
        make_config({section: {key: value}})
    (line,) = caught.value.faults
    given_as = line.partition(" is not allowed: ")[0]
    assert given_as.startswith(f"{section}.{key}: ")
    assert shown in given_as


BAD_KEYS = [
    ("optimiser: {lr: 0.1}", "optimiser", "did you mean optimizer?"),
    ("optimizer: {learning_rat: 0.1}", "optimizer.learning_rat", "lr, momentum"),
    ("optimizer: {warmup_epoch: 1}", "optimizer.warmup_epoch", "did you mean optimizer.warmup_epochs?"),
    (
        "optimizer: {epochs_per_level: 5}",
        "optimizer.epochs_per_level",
        "did you mean experiment_params.epochs_per_level?",
    ),
    ("lr: 0.1", "lr", "it belongs below `optimizer:`"),
    ("optimizer.lr: 0.1", "optimizer.lr", "write `optimizer:` and `lr: ...` indented below it"),
    ("optimizer: 0.1", "optimizer", "a mapping of options"),
    ("optimizer: [lr, 0.1]", "optimizer", "a mapping of options"),
    ("null: {lr: 1}", "null", "unknown section"),
    ("optimizer: {null: 1}", "optimizer.null", "unknown option"),
    ("a: &a {lr: 0.1}\noptimizer: *a", "a", "unknown section"),
    ("optimizer: {<<: {lrr: 0.1}}", "optimizer.lrr", "unknown option"),
]


@pytest.mark.parametrize(("text", "path", "hint"), BAD_KEYS, ids=[case[0] for case in BAD_KEYS])
def test_bad_key(in_file, text, path, hint):
    (line,) = faults_of(in_file(text))
    assert line.startswith(f"{path}: ")
    assert hint in line


BAD_FILES = [
    ("", "is empty"),
    ("# nothing but a comment\n", "is empty"),
    ("- a\n- b\n", "not a mapping"),
    ("just words", "not a mapping"),
    ("optimizer:\n  lr: 0.1\n  lr: 0.2\n", "line 3: lr is given twice (first on line 2)"),
    ("optimizer: {lr: 1}\ndataset: {}\noptimizer: {}\n", "line 3: optimizer is given twice (first on line 1)"),
    ("optimizer:\n  lr: [0.1\n", "line 3: not valid YAML"),
    ("optimizer:\n\tlr: 0.1\n", "line 2: not valid YAML"),
    ("optimizer:\n  lr: 0.1\n momentum: 0.9\n", "line 3: not valid YAML"),
    ("optimizer: {}\n---\ndataset: {}\n", "line 2: not valid YAML"),
    ("optimizer: *nothing\n", "line 1: not valid YAML"),
    ("optimizer: {lr: !!int 3}\n", "line 1: not valid YAML"),
    ("optimizer: {lr: !!timestamp x}\n", "line 1: not valid YAML"),
    ("optimizer: {lr: !!python/object/apply:os.getcwd []}\n", "not valid YAML"),
    ("? [a, b]\n: 1\n", "line 1: not valid YAML"),
    ("a: " + "[" * 600, "nested too deeply"),
    (b"\x80\x02ctorch\n", "line 1: not a text file"),
    (b"optimizer:\n  lr: \x00\n", "line 2: not a text file"),
    (b"PK\x03\x04" + bytes(range(256)), "not a text file"),
    (b"#" * (1 << 20) + b"\nlr: 1", "no config file"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_FILES, ids=[problem for _, problem in BAD_FILES])
def test_bad_file(in_file, text, problem):
    words = in_file(text)
    (line,) = faults_of(words)
    assert line.startswith(f"--config {words[1]}: ")
    assert problem in line


def test_unreadable_files(tmp_path):
    (tmp_path / "lenet.yaml").write_text("{}")
    (line,) = faults_of(["--config", str(tmp_path / "lennet.yaml")])
    assert "no such file" in line
    assert f"did you mean {tmp_path / 'lenet.yaml'}?" in line
    (line,) = faults_of(["--config", str(tmp_path / "none" / "x.yaml")])
    assert "no such file" in line
    (line,) = faults_of(["--config", str(tmp_path)])
    assert "directory" in line
    (line,) = faults_of(["--config", str(tmp_path / "lenet.yaml" / "x.yaml")])
    assert "cannot be read" in line
    (line,) = faults_of(["--config", "a\0b"])
    assert "cannot be read" in line
    (line,) = faults_of(["--config="])
    assert "the path of a YAML file" in line


def test_a_missing_file_brings_no_faults_that_are_none(tmp_path):
    """Without the file its data set is unknown: 100 classes may well be right."""
    lines = faults_of([f"--config={tmp_path}/x.yaml", "--dataset.num_classes=100", "--optimizer.lr=x"])
    assert len(lines) == 2
    assert lines[1].startswith("optimizer.lr: x")


def test_endless_file_is_refused():
    (line,) = faults_of(["--config", "/dev/zero"])
    assert "no config file" in line


BAD_WORDS = [
    (["x.yaml"], "x.yaml: unexpected word"),
    (["-x"], "-x: unexpected word"),
    (["--"], "--: unexpected word"),
    (["--lr=1"], "--lr: unknown option: did you mean --optimizer.lr?"),
    (["--confg=x.yaml"], "--confg: unknown option: did you mean --config?"),
    (["--config-file=x.yaml"], "--config-file: unknown option: did you mean --config?"),
    (["--optimizer.lrr=1"], "optimizer.lrr: unknown option (given as 1): did you mean optimizer.lr?"),
    (["--optimizers.lr=1"], "optimizers: unknown section: did you mean optimizer?"),
    (["--optimizer.l=1"], "did you mean optimizer.lr?"),
    (["--optimizer.lr.x=1"], "optimizer.lr.x: unknown option"),
    (["--optimizer.lr"], "--optimizer.lr: a value is missing"),
    (["--config"], "--config: a value is missing"),
    (["--optimizer.lrr"], "--optimizer.lrr: unknown option: did you mean --optimizer.lr?"),
    (["--optimizer.nesterov", "--optimizer.lr=1"], "write --optimizer.nesterov=true"),
    (["--optimizer.lr=1", "--optimizer.lr", "2"], "--optimizer.lr: given twice on the command line (again as 2)"),
    (["--config", EMBEDDED, "--config", EMBEDDED], "--config: given twice"),
    (["--optimizer.lr="], "optimizer.lr: '' is not allowed: a number > 0"),
    (["--optimizer.lr", "-1"], "optimizer.lr: -1 is not allowed: a number > 0"),
    (["--optimizer.nesterov=maybe"], "optimizer.nesterov: maybe is not allowed: true or false"),
    (["--experiment_params.epochs_per_level=3.9"], "experiment_params.epochs_per_level: 3.9 is not allowed"),
    (["--optimizer.lr=null"], "optimizer.lr: null is not allowed"),
    (["--experiment_params.expt_name=a\udcffb"], "experiment_params.expt_name: 'a\\udcffb' is not allowed"),
    (["--prune_params.num_levels=" + "9" * 10000], "prune_params.num_levels: '999"),
]


@pytest.mark.parametrize(("words", "expected"), BAD_WORDS, ids=[" ".join(words)[:50] for words, _ in BAD_WORDS])
def test_bad_words(words, expected):
    (line,) = faults_of(words)
    assert expected in line
    assert len(line) < 400


def test_every_fault_is_reported_at_once(in_file):
    words = in_file(
        "optimizer:\n  lr: -1\n  lr: -2\n  momentm: 0.9\n  nesterov: nope\ndatset: {}\n"
        "dataset: {dataset_name: CIFAR100, num_classes: 7}\n"
        "experiment_params: {training_type: wr, epochs_per_level: 1, expt_name: ../up}\n"
        "dist_params: {port: 99999}\n"
    )
    lines = faults_of([*words, "stray", "--prune_params.prune_rate=2", "--prune_params.prune_rte=2"])
    expected = [
        "stray: ",
        f"--config {words[1]}: line 3: lr is given twice",
        "optimizer.momentm: ",
        "datset: ",
        "prune_params.prune_rte: ",
        "dataset.num_classes: 7",
        "prune_params.prune_rate: 2",
        "experiment_params.expt_name: ../up",
        "optimizer.lr: -2",
        "optimizer.nesterov: nope",
        "dist_params.port: 99999",
        "prune_params.rewind_epoch: 1",
    ]
    assert len(lines) == len(expected)
    for start in expected:
        assert sum(line.startswith(start) for line in lines) == 1, start


def test_null_is_refused_for_options_and_empty_for_names(in_file):
    for option in OPTIONS:
        section, key = option.split(".")
        words = in_file(f"{section}: {{{key}: null}}")
        if SCHEMA.entries[section, key].checker.empty == "":
            assert getattr(getattr(load_config(words), section), key) == ""
        else:
            (line,) = faults_of(words)
            assert line.startswith(f"{option}: null is not allowed: ")
            assert "or leave it out for the default" in line
    assert load_config(["--experiment_params.resume_expt_name=null"]).experiment_params.resume_expt_name == ""
    assert load_config(in_file("optimizer:\n  # lr: 0.1\n")) == make_config()  # nothing is set, so nothing is ignored


def check_outcome(words: list[str]) -> None:
    """A config, or faults of a line each."""
    try:
        load_config(words)
    except ConfigError as error:
        faults = error.faults
    else:
        return
    assert faults
    assert all(line and len(line.splitlines()) == 1 for line in faults), faults


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(
        st.text(max_size=12) | st.sampled_from([f"--{o}" for o in OPTIONS] + ["=", "--config", "1"]), max_size=4
    )
)
def test_any_words_end_in_a_config_or_in_faults(words):
    check_outcome([word for word in words if word not in ("-h", "--help")])


_SCRAPS = st.binary(max_size=6) | st.sampled_from(
    [b"!!binary x", b"!!bool x", b"&a [*a]", b"? ", b"<<: ", b"- ", b"\n", b"\n  ", b"\t", b"{", b"]", b"---\n", b": ",
     b"null"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), scrap=_SCRAPS, gone=st.integers(0, 12))
def test_any_damage_to_a_file_ends_in_a_config_or_in_faults(in_file, place, scrap, gone):
    whole = Path(EMBEDDED).read_bytes()
    at = int(place * len(whole))
    check_outcome(in_file(whole[:at] + scrap + whole[at + gone :]))
