"""Bad configs and bad data through harness.py's own main: exit status, one clear line, and nothing half-made."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import harness

# Options, and what the one line must name.
BAD_CONFIGS = {
    "unknown key": (["--optimizer.learning_rate=0.1"], "optimizer.learning_rate"),
    "unknown section": (["--optim.lr=0.1"], "optim"),
    "misspelt key": (["--prune_params.prune_rat=0.1"], "prune_params.prune_rate"),
    "key without section": (["--lr=0.1"], "lr"),
    "word without dashes": (["lr"], "lr"),
    "missing file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "folder for a file": (["--config", "."], "."),
    "text for a number": (["--optimizer.lr=fast"], "optimizer.lr"),
    "nan": (["--optimizer.lr=nan"], "optimizer.lr"),
    "negative rate": (["--optimizer.lr=-0.1"], "optimizer.lr"),
    "fraction for an int": (["--prune_params.num_levels=3.9"], "prune_params.num_levels"),
    "zero levels": (["--prune_params.num_levels=0"], "prune_params.num_levels"),
    "prune rate of one": (["--prune_params.prune_rate=1"], "prune_params.prune_rate"),
    "bool misspelt": (["--optimizer.nesterov=maybe"], "optimizer.nesterov"),
    "unknown method": (["--prune_params.prune_method=magnitude"], "prune_params.prune_method"),
    "unknown method at init": (["--prune_params.er_method=erk"], "prune_params.er_method"),
    "unknown training type": (["--experiment_params.training_type=imprr"], "experiment_params.training_type"),
    "unknown schedule": (["--optimizer.scheduler_type=Cosine"], "optimizer.scheduler_type"),
    "unknown data set": (["--dataset.dataset_name=CIFAR11"], "dataset.dataset_name"),
    "wrong classes": (["--dataset.num_classes=100"], "dataset.num_classes"),
    "rewinding past the end": (
        ["--experiment_params.training_type=wr", "--prune_params.rewind_epoch=20"],
        "prune_params.rewind_epoch",
    ),
    "rewinding nowhere": (
        ["--experiment_params.training_type=wr", "--prune_params.rewind_epoch=0"],
        "prune_params.rewind_epoch",
    ),
    "warm-up past the end": (["--optimizer.warmup_epochs=20"], "optimizer.warmup_epochs"),
    "milestone past the end": (["--optimizer.milestones=0.5,25"], "optimizer.milestones"),
    "nesterov without momentum": (["--optimizer.nesterov=true", "--optimizer.momentum=0"], "optimizer.nesterov"),
    "name with a path": (["--experiment_params.expt_name=../x"], "experiment_params.expt_name"),
    "resume nothing": (["--experiment_params.resume_expt_name=none"], "experiment_params.resume_expt_name"),
    "resume a level of nothing": (["--experiment_params.resume_level=2"], "experiment_params.resume_level"),
    "port out of range": (["--dist_params.port=70000"], "dist_params.port"),
    "unknown model": (["--model_params.model_name=resnet19"], "model_params.model_name"),
    "model too big for the images": (["--model_params.model_name=inception_v3"], "model_params.model_name"),
    "exclude nothing": (["--prune_params.exclude=conv9"], "prune_params.exclude"),
    "exclude everything": (["--prune_params.exclude=*"], "prune_params.exclude"),
    "fp16 on a CPU": (["--experiment_params.precision=fp16"], "experiment_params.precision"),
    "CUDA graphs on a CPU": (["--experiment_params.cuda_graphs=true"], "experiment_params.cuda_graphs"),
    "nccl without GPUs": (["--dist_params.backend=nccl"], "dist_params.backend"),
    "workers for a set in memory": (["--dataset.loader=torchvision"], "dataset.loader"),
    "another size in memory": (["--dataset.resolution=16"], "dataset.resolution"),
    "alternating flips of digits": (["--dataset.alternate_flip=true"], "dataset.alternate_flip"),
    "more batches to score than there are": (
        ["--prune_params.prune_method=snip", "--prune_params.score_batches=100"],
        "prune_params.score_batches",
    ),
    "fewer weights than layers": (
        ["--prune_params.prune_method=random_erk", "--prune_params.prune_rate=0.9", "--prune_params.num_levels=7"],
        "prune_params.num_levels",
    ),
    "fewer weights than layers at initialization": (
        ["--prune_params.er_method=er_balanced", "--prune_params.er_init=1e-6"],
        "prune_params.er_init",
    ),
    "last batch of one digit": (["--dataset.batch_size=4", "--model_params.model_name=resnet20"], "dataset.batch_size"),
    "batches of one digit": (["--dataset.batch_size=1", "--model_params.model_name=vgg11_bn"], "dataset.batch_size"),
    "option twice": (["--optimizer.lr=0.1", "--optimizer.lr=0.2"], "optimizer.lr"),
}


@pytest.fixture(autouse=True)
def signals_as_they_were():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def run(base: Path, words: list[str]) -> int:
    return harness.main([f"--experiment_params.base_dir={base}", "--dist_params.nproc=1", *words])


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_exits_2_and_creates_nothing(case, tmp_path, capsys):
    words, named = BAD_CONFIGS[case]
    base = tmp_path / "runs"
    assert run(base, words) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == ""
    assert len(lines) == 1, err
    assert named in lines[0]
    assert lines[0].startswith("harness: ")
    assert not base.exists()


def test_all_faults_are_told_at_once(tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text("optimizer: {lr: -1, momentun: 0.9}\nprune_params: {num_levels: 2.5}\n")
    assert run(tmp_path / "runs", ["--config", str(file), "--dist_params.nproc=1x"]) == 2
    err = capsys.readouterr().err
    for named in ("optimizer.lr", "optimizer.momentun", "prune_params.num_levels", "dist_params.nproc"):
        assert named in err


# --- data ------------------------------------------------------------------------------------------------------------


def tree(root: Path) -> Path:
    """A good ImageFolder tree of small photographs-to-be."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def empty_class(root: Path) -> None:
    for file in (root / "train/cat").iterdir():
        file.unlink()


def other_size(root: Path) -> None:
    Image.new("RGB", (20, 16)).save(root / "train/cat/0.png")


def no_folder(root: Path, name: str) -> None:
    for file in sorted((root / name).rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (root / name).rmdir()


MEMORY = ["--dataset.loader=memory"]
BAD_TREES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "truncated image": (lambda r: truncate(r / "train/dog/1.png"), [], "dog/1.png"),
    "truncated test image": (lambda r: truncate(r / "val/dog/1.png"), [], "dog/1.png"),
    "text for an image": (lambda r: (r / "train/dog/1.png").write_text("hello"), [], "dog/1.png"),
    "stray file": (lambda r: (r / "train/dog/notes.txt").write_text("hello"), [], "notes.txt"),
    "empty image": (lambda r: (r / "train/dog/1.png").write_bytes(b""), [], "dog/1.png"),
    "empty class": (empty_class, [], "cat"),
    "unequal sizes in memory": (other_size, MEMORY, "need one size"),
    "no train folder": (lambda r: no_folder(r, "train"), [], "train"),
    "no val folder": (lambda r: no_folder(r, "val"), [], "val"),
    "class missing from val": (lambda r: no_folder(r, "val/dog"), [], "dog"),
    "class missing from train": (lambda r: no_folder(r, "train/dog"), [], "dog"),
    "empty tree": (lambda r: [no_folder(r, s) for s in ("train", "val")], [], "train"),
}
MISFITS = {
    "wrong number of classes": (["--dataset.num_classes=3"], "dataset.num_classes"),
    "last batch of one": (["--dataset.batch_size=7", "--model_params.model_name=resnet18"], "dataset.drop_last"),
    "test images of a size that the model cannot take": (
        ["--model_params.model_name=vit_b_16", "--dataset.resolution=32", "--dataset.eval_resolution=48"],
        "model_params.model_name",
    ),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_bad_tree_exits_1_and_leaves_no_run(case, tmp_path, capsys):
    spoil, words, named = BAD_TREES[case]
    root = tree(tmp_path / "tree")
    spoil(root)
    base = tmp_path / "runs"
    common = ["--dataset.dataset_name=ImageFolder", f"--dataset.data_root={root}", "--dataset.batch_size=4"]
    assert run(base, [*common, *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert named in err
    assert not base.exists()


@pytest.mark.parametrize("case", MISFITS)
def test_option_that_does_not_fit_the_tree_exits_2_and_leaves_no_run(case, tmp_path, capsys):
    words, named = MISFITS[case]
    common = ["--dataset.dataset_name=ImageFolder", f"--dataset.data_root={tree(tmp_path / 'tree')}"]
    common += [] if "batch_size" in words[0] else ["--dataset.batch_size=4"]
    assert run(tmp_path / "runs", [*common, *words]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    assert named in err
    assert not (tmp_path / "runs").exists()


BAD_FILES = {
    "missing, no download": (lambda raw: None, "dataset.data_root"),
    "truncated images": (lambda raw: (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0"), "train-images"),
    "not idx": (lambda raw: (raw / "train-images-idx3-ubyte").write_bytes(b"x" * 100), "train-images"),
    "a folder in its place": (lambda raw: (raw / "train-images-idx3-ubyte").mkdir(), "train-images"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_exit_1_and_leave_no_run(case, tmp_path, capsys):
    spoil, named = BAD_FILES[case]
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    if case != "missing, no download":
        for name in ("train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\0")
    spoil(raw)
    words = ["--dataset.dataset_name=FashionMNIST", f"--dataset.data_root={tmp_path / 'data'}"]
    assert run(tmp_path / "runs", [*words, "--dataset.download=false"]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    assert named in err
    assert not (tmp_path / "runs").exists()


# --- the run directory -----------------------------------------------------------------------------------------------


def test_base_dir_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "runs", []) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "experiment_params.base_dir" in err


def test_name_taken(tmp_path, capsys):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert run(tmp_path / "runs", ["--experiment_params.expt_name=mine"]) == 2
    err = capsys.readouterr().err
    assert "experiment_params.expt_name" in err and "resume" in err
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
