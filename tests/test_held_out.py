"""Validation images: which ones are held out, that nothing trains on them, and what a run says of them."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Finished
from tests.data_helpers import digit_tree, load
from tests.traps import StopAt
from utils.analyze import main as analyze
from utils.data.held_out import held_out_counts, hold_out
from utils.data.published import files_of
from utils.errors import ConfigError
from utils.models import create_model
from utils.runs.tables import EPOCH_COLUMNS, SUMMARY, columns_of, summary_row

HELD_OUT = 203
OPTION = {"dataset.validation_images": HELD_OUT}
# Two of three epochs are evaluated, and a level has a short last batch.
RUN = {**OPTION, "prune_params.num_levels": 2, "experiment_params.eval_every_epochs": 2, "dataset.batch_size": 200}
VALIDATION, BEST = ["val_acc", "val_loss"], ["best_val_acc", "best_val_epoch", "best_val_test_acc"]

PINNED = [1, 4, 10, 17, 20, 30, 31, 39]  # 2 of each of 4 classes, of 40 images labelled 0, 1, 2, 3, 0, ...

# --- how many of each class, and which -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "images", "counts"),
    [
        ([100, 900], 100, [10, 90]),
        ([3, 3, 4], 5, [2, 1, 2]),  # due 1.5, 1.5, 2: of equal fractions the lower class is first
        ([10, 20, 31], 10, [2, 3, 5]),  # due 1.64, 3.28, 5.08
        ([5, 5, 5], 4, [2, 1, 1]),
        ([2, 98], 10, [1, 9]),  # due 0.2 and 9.8: rounded 0 and 10
        ([2, 98], 95, [1, 94]),  # due 1.9 and 93.1: rounded 2, all of them, and 93
        ([2, 2, 2, 94], 6, [1, 1, 1, 3]),
        ([7], 3, [3]),
    ],
)
def test_counts_by_hand(sizes, images, counts):
    assert held_out_counts(sizes, images) == counts


@st.composite
def classes_and_images(draw):
    sizes = draw(st.lists(st.one_of(st.integers(2, 6), st.integers(2, 300)), min_size=1, max_size=12))
    return sizes, draw(st.integers(len(sizes), sum(sizes) - len(sizes)))


@given(classes_and_images())
def test_counts_are_exact_in_proportion_and_leave_every_class_an_image(case):
    sizes, images = case
    counts, due = held_out_counts(sizes, images), [size * images / sum(sizes) for size in sizes]
    assert sum(counts) == images and len(counts) == len(sizes)
    assert all(1 <= count < size for count, size in zip(counts, sizes))
    if all(1 <= share <= size - 1 for share, size in zip(due, sizes)):
        assert all(abs(count - share) < 1 for count, share in zip(counts, due))
    for a in range(len(sizes)):
        assert all(counts[a] >= counts[b] - 1 for b in range(len(sizes)) if sizes[a] >= sizes[b])


@given(classes_and_images(), st.integers(0, 1000))
def test_a_training_set_is_split_into_two_parts(case, seed):
    sizes, images = case
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    kept, held_out = hold_out(labels, images)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in (kept, held_out))
    assert np.bincount(labels[held_out]).tolist() == held_out_counts(sizes, images)


def test_the_images_are_a_constant():
    """Runs of all times and places are compared on these."""
    labels = np.arange(40) % 4
    assert hold_out(labels, 8)[1].tolist() == PINNED
    more = hold_out(labels, 20)[1]
    assert set(PINNED) < set(more.tolist()), "more images contain the fewer ones"
    assert hold_out(labels, 0)[0].tolist() == list(range(40)) and not len(hold_out(labels, 0)[1])


# --- loaders ---------------------------------------------------------------------------------------------------------


def pixels(batches) -> Counter:
    """How often each (image, label) is there."""
    return Counter((image.numpy().tobytes(), int(label)) for batch in batches for image, label in zip(*batch))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return digit_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(params=["Digits", "memory", "torchvision"])
def loader(request, tree):
    """loader(images, **more) -> data with that many validation images, and without augmentation unless asked for."""
    options = {"dataset_name": "Digits", "batch_size": 100}
    if request.param != "Digits":
        options = {"dataset_name": "ImageFolder", "loader": request.param, "batch_size": 8, "num_workers": 0}
    return lambda images, **more: load(tree, **{**options, "augment": "none", "validation_images": images, **more})


@pytest.fixture
def held_in_memory_as_one(monkeypatch):
    """Trees in memory are normalised by their own training images: here all by the same numbers, to be compared."""
    monkeypatch.setattr("utils.dataset.pixel_statistics", lambda images: ((0.5,) * 3, (0.25,) * 3))


def test_training_and_validation_images_make_up_the_training_set(loader, held_in_memory_as_one):
    whole, data = loader(0), loader(12)
    assert whole.validation is None and whole.evaluated == [whole.test]
    held_out = pixels(data.validation.batches())
    assert held_out.total() == 12 == data.validation.num_images
    everything = pixels(whole.train.batches(0, 0))
    for epoch in (0, 3):
        assert pixels(data.train.batches(1, epoch)) + held_out == everything
    scored = pixels(data.train.score_batches(0, 2))
    assert scored.total() == 2 * data.train.batch_size and scored <= everything - held_out
    assert pixels(data.test.batches()) == pixels(whole.test.batches())
    labels = Counter(label for _, label in held_out.elements())
    assert set(labels) == set(range(data.num_classes)) and data.identity != whole.identity
    for part in (whole, data):
        part.close()


def test_the_same_images_for_all_seeds_and_augmentations(loader):
    expected = pixels(loader(12).validation.batches())
    for data in (loader(12, seed=7), loader(12, augment="crop_flip")):
        assert pixels(data.validation.batches()) == expected


@pytest.mark.parametrize("loader", ["memory", "torchvision"], indirect=True)
def test_ranks_share_the_images_out(loader):
    ranks = [loader(12, rank=rank, world=3, drop_last=True) for rank in range(3)]
    shared_out = pixels(batch for data in ranks for batch in data.validation.batches())
    assert shared_out == pixels(loader(12).validation.batches()) and shared_out.total() == 12
    assert all(data.validation.num_images == 12 for data in ranks)


def test_a_tree_in_memory_is_normalised_by_the_images_it_trains_on(tree):
    options = {"dataset_name": "ImageFolder", "loader": "memory", "batch_size": 8, "augment": "none"}
    data = load(tree, validation_images=12, **options)
    images = torch.cat([images for images, _ in data.train.batches(0, 0)])
    assert images.mean().abs() < 1e-5 and (images.std(unbiased=False) - 1).abs() < 1e-5


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "allowed"), [(9, "0, or at least 10"), (1428, "0, or 10 to 1427")])
def test_more_or_fewer_than_there_can_be(fork, images, allowed):
    run = fork("x", status=2, **{"dataset.validation_images": images})
    assert run.last_line.startswith(f"harness: dataset.validation_images: {images} is not allowed: {allowed}")
    assert not run.path.exists()


def test_a_class_with_a_single_image(tree):
    with pytest.raises(ConfigError, match=r"class 2 .* has a single training image"):
        hold_out(np.array([0, 0, 1, 1, 2]), 3)
    with pytest.raises(ConfigError, match=r"dataset\.validation_images: 39 is not allowed: 0, or 3 to 37"):
        load(tree, dataset_name="ImageFolder", validation_images=39)


def test_a_step_to_go_on_from_is_one_of_the_same_training_set(fork):
    source = {"prune_params.num_levels": 1, "prune_params.rewind_epoch": 1, "experiment_params.training_type": "wr"}
    fork("source", **source)
    ticket = {**source, "ticket_params.source": "source", "ticket_params.weights": "rewind"}
    run = fork("ticket", status=2, **ticket, **OPTION)
    assert "dataset.validation_images" in run.last_line and not run.path.exists()


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(forks) -> Finished:
    return forks("whole", **RUN)


def figures_by_hand(run: Finished, level: int) -> tuple[float, float]:
    """(accuracy in percent, mean cross entropy) of a level's checkpoint on the validation images."""
    images, labels = files_of("Digits").read(None, train=True)
    _, held_out = hold_out(labels, HELD_OUT)
    inputs = ((torch.from_numpy(images[held_out]) / 16 - 0.3059) / 0.3766).permute(0, 3, 1, 2)
    network = create_model("lenet_300_100", 10, (1, 8, 8)).eval()
    network.load_state_dict({k: v for k, v in run.checkpoint(f"level_{level}").items() if not k.endswith("_mask")})
    answers = torch.from_numpy(labels[held_out])
    with torch.no_grad():
        logits = network(inputs)
    return (
        100 * float((logits.argmax(1) == answers).double().mean()),
        float(torch.nn.functional.cross_entropy(logits.double(), answers)),
    )


def test_the_figures_of_a_run_are_those_of_its_checkpoints(run):
    assert list(run.csv("summary")) == columns_of(SUMMARY) + VALIDATION + BEST
    for level, row in run.csv("summary").iterrows():
        epochs = run.csv(f"epochwise_metrics/level_{level}_metrics")
        assert list(epochs) == EPOCH_COLUMNS + VALIDATION
        for column in ("test_acc", *VALIDATION):
            assert epochs[column].notna().tolist() == [False, True, True]
        accuracy, loss = figures_by_hand(run, level)
        assert row["val_acc"] == epochs["val_acc"].iloc[-1] == pytest.approx(accuracy, abs=1e-9)
        assert row["val_loss"] == epochs["val_loss"].iloc[-1] == pytest.approx(loss, abs=1e-5)
        best = epochs.loc[epochs["val_acc"].idxmax()]
        assert row[BEST].tolist() == [best["val_acc"], best["epoch"], best["test_acc"]]
    assert "best_val_test_acc" in run.out


def test_several_processes_count_each_image_once(forks):
    two = forks("two", **RUN, **{"dist_params.nproc": 2})
    for level, row in two.csv("summary").iterrows():
        accuracy, loss = figures_by_hand(two, level)
        assert row["val_acc"] == pytest.approx(accuracy, abs=1e-9)
        assert row["val_loss"] == pytest.approx(loss, abs=1e-5)


def test_one_file_gives_the_same_bits(run, launch):
    launch("whole", program=("-m", "utils.single_gpu_harness"), **RUN).assert_same_figures(run)


def test_stopped_in_mid_epoch_and_resumed_it_has_the_same_bits(run, fork):
    fork("parts", status=143, trap=StopAt(10), **RUN)
    fork("parts", resume=True, **RUN).assert_same_figures(run)


def test_a_level_started_again_reads_its_tables_back(run, fork):
    fork("again", **RUN)
    fork("again", resume=True, **RUN, **{"experiment_params.resume_level": 1}).assert_same_figures(run)
    other = fork("again", resume=True, status=2, **{**RUN, "dataset.validation_images": 100})
    assert other.last_line.startswith("harness: dataset.validation_images: 100 would change the experiment")


def test_the_best_epoch_is_the_earliest_of_several():
    rows = [
        {"epoch": 3 + n, "test_acc": test, "test_loss": 0.5, "seconds": 1.0, "val_acc": val, "val_loss": 0.1 * n}
        for n, (test, val) in enumerate([(50.0, 60.0), (float("nan"),) * 2, (70.0, 80.0), (90.0, 80.0), (95.0, 75.0)])
    ]
    row = summary_row(0, 1.0, rows, 10.0)
    assert row["final_test_acc"] == row["max_test_acc"] == 95.0
    found = {column: row[column] for column in VALIDATION + BEST}
    assert found == {
        "val_acc": 75.0, "val_loss": 0.4, "best_val_acc": 80.0, "best_val_epoch": 5, "best_val_test_acc": 70.0,
    }  # fmt: skip
    without = [{key: value for key, value in row.items() if not key.startswith("val")} for row in rows]
    assert list(summary_row(0, 1.0, without, 10.0)) == columns_of(SUMMARY)


def test_a_barrier_on_validation_images(run, forks, tmp_path, capsys):
    """The ends of the line are the runs' own networks: their errors are those that the runs have recorded."""
    other = forks("other", **RUN, **{"experiment_params.data_seed": 7})
    out = tmp_path / "barrier.csv"
    words = ["barrier", str(run.path), str(other.path), "--levels=0", "--points=2", f"--out={out}"]
    assert analyze([*words, "--split=validation"]) == 0
    recorded = [one.csv("summary")["val_acc"][0] for one in (run, other)]
    assert (100 - pd.read_csv(out)["error"]).tolist() == pytest.approx(recorded, abs=1e-9)
    out.unlink()
    plain = [
        forks(f"plain_{seed}", **{**RUN, "dataset.validation_images": 0, "experiment_params.data_seed": seed}).path
        for seed in (0, 7)
    ]
    capsys.readouterr()
    words[1:3] = map(str, plain)
    assert analyze([*words, "--split=validation"]) == 2 and not out.exists()
    assert "--split: validation is not allowed here" in capsys.readouterr().err
