"""Training by CUDA graphs, emulated on the CPU (tests/recorded_graph.py): the bits of training without them."""

import copy
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness_params import make_config
from tests.recorded_graph import RecordedGraphs
from tests.traps import Both, MustBeMet, StopAt
from utils.conv_type import apply_masks, insert_masks, masked_params
from utils.data.images import Normalizer
from utils.data.in_memory import MemoryTestLoader, MemoryTrainLoader
from utils.data.loaders import Data
from utils.distributed import Context
from utils.errors import ConfigError, RunError
from utils.pruning_utils import prune
from utils.state_dicts import load_weights
from utils.training import trainer as trainer_module
from utils.training.graphs import STEPS_PER_MARK, WARM_UP, CudaGraphs, choose_graphs
from utils.training.tally import Tally
from utils.training.trainer import Trainer

# 38 images: four batches of 8 and one of 6 per epoch; five epochs, so that the last batch is captured in the fourth.
IMAGES, BATCH, STEPS, EPOCHS, LEVELS = 38, 8, 5, 5, 3
CPU = torch.device("cpu")


def rounded(plain: Callable[..., float]) -> Callable[..., float]:
    """A learning rate as `set_rate` rounds it on a GPU; without graphs the CPU's steps take any float."""
    return lambda *args: float(np.float32(plain(*args)))


@pytest.fixture(autouse=True)
def rates_of_a_gpu(monkeypatch):
    monkeypatch.setattr(trainer_module, "learning_rate", rounded(trainer_module.learning_rate))


class Net(nn.Module):
    """Convolutions, BatchNorm, a residual, and what the tests add: `extra` is called on the features."""

    def __init__(self, dropout: float, extra: Callable[[Tensor], Tensor]):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.drop, self.fc, self.extra = nn.Dropout(dropout), nn.Linear(8, 5), extra

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.one(x)))
        x = self.drop(F.relu(self.bn2(self.two(x)) + x))
        return self.fc(self.extra(x.mean((2, 3))))


def make_trainer(
    kind: type[CudaGraphs] | None, options: dict, dropout: float = 0.0, extra: Callable = lambda x: x
) -> Trainer:
    """A trainer on random images. Args: kind: of graphs; None for none."""
    cfg = make_config(
        {
            "dataset": {"alternate_flip": False, **options.get("dataset", {})},
            "experiment_params": {
                "epochs_per_level": EPOCHS, "precision": "fp32", "cuda_graphs": "auto" if kind else "off",
                **options.get("experiment_params", {}),
            },
            "optimizer": {
                "lr": 0.1, "scheduler_type": "CosineLRWarmup", "warmup_epochs": 2, **options.get("optimizer", {}),
            },
        }
    )  # fmt: skip
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(256, (IMAGES, 8, 8, 3), generator=draws, dtype=torch.uint8).numpy()
    labels = torch.randint(5, (IMAGES,), generator=draws).numpy()
    normalize = Normalizer((0.5,) * 3, (0.25,) * 3, (3, 8, 8), CPU)
    plan = {"batch_size": BATCH, "drop_last": False, "seed": 0, "rank": 0, "world": 1}
    crop, flip = options.get("recipe", (True, True))
    plan |= options.get("loader", {})
    train = MemoryTrainLoader(images, labels, normalize, crop, flip, cfg.dataset.alternate_flip, **plan)
    test = MemoryTestLoader(images[:21], labels[:21], normalize)
    test.batch_size = 10  # 10, 10 and 1
    torch.manual_seed(0)
    model = insert_masks(Net(dropout, extra)).to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "graphs_class", kind or CudaGraphs)
        data = Data(train, test, 5, (3, 8, 8))
        if options.get("validation"):
            data.validation = MemoryTestLoader(images[21:], labels[21:], normalize)
        return Trainer(cfg, Context(), model, data)


def train_epoch(one: Trainer, level: int, epoch: int, stop: Callable[[int], bool] = lambda steps: False):
    one.seed_draws(level, epoch)
    tally = one.new_tally()
    finished = one.train_epoch(level, epoch, tally, stop)
    if not finished:
        return tally
    return finish_epoch(one, level, epoch, tally)


def finish_epoch(one: Trainer, level: int, epoch: int, tally: Tally) -> dict[str, float]:
    """What the epoch came to, without its speed."""
    figures = one.finish_epoch(level, epoch, tally, evaluate=True)
    assert all(math.isfinite(figure) for figure in figures.values())
    evaluated = [figure for name, figure in figures.items() if name.endswith("_loss")]
    sets, networks = 1 + (one.data.validation is not None), 1 + (one.average is not None)
    assert len(evaluated) == len(set(evaluated)) == 1 + sets * networks  # each is a figure of its own
    return {name: figure for name, figure in figures.items() if name != "images_per_second"}


def study(one: Trainer, training_type: str) -> list:
    """The figures of every epoch of a whole study, and the weights at the end of each level."""
    found: list = []
    saved = {"init": (copy.deepcopy(one.model.state_dict()), None, 0)}
    for level in range(LEVELS):
        first, state = 0, None
        if level:
            prune(one.model, "mag", 0.5**level)
        if level and training_type != "lrr":
            weights, state, first = saved["init" if training_type == "imp" else "rewind"]
            load_weights(one.model, weights, "the test")
        apply_masks(one.model)
        one.restart(state)
        for epoch in range(first, EPOCHS):
            found.append(train_epoch(one, level, epoch))
            if level == epoch == 0:
                states = one.model.state_dict(), one.optimizer_state_dict()
                saved["rewind"] = *copy.deepcopy(states), 1
        found.append(copy.deepcopy(one.model.state_dict()))
    return found


def assert_equal(found: list, expected: list) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(mine, dict) and any(isinstance(value, Tensor) for value in theirs.values()):
            assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
        else:
            assert mine == theirs


CASES = {
    "imp": ("imp", {}),
    "wr, clipped": ("wr", {"optimizer": {"grad_clip": 0.5, "weight_decay": 0.01}}),
    "lrr, nesterov": ("lrr", {"optimizer": {"nesterov": True, "label_smoothing": 0.1, "no_decay_bn": True}}),
    "alternate flips, no crop": (
        "imp",
        {"dataset": {"augment": "flip", "alternate_flip": True}, "recipe": (False, True)},
    ),
    "validation images": ("imp", {"validation": True}),
    "average": ("wr", {"experiment_params": {"ema_decay": 0.75}}),
    "average, validation images": ("wr", {"experiment_params": {"ema_decay": 0.75}, "validation": True}),
    "images as they are": ("lrr", {"recipe": (False, False), "optimizer": {"momentum": 0.0}}),
    "adam": ("wr", {"optimizer": {"optimizer_name": "adam", "lr": 0.01, "grad_clip": 0.5}}),
    "adamw": (
        "imp",
        {"optimizer": {"optimizer_name": "adamw", "lr": 0.01, "weight_decay": 0.5, "beta2": 0.9, "no_decay_bn": True}},
    ),
    "bf16": ("wr", {"experiment_params": {"precision": "bf16"}, "optimizer": {"grad_clip": 0.5}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_study_by_graphs_has_the_bits_of_one_without(name):
    training_type, options = CASES[name]
    plain, graphs = make_trainer(None, options), make_trainer(RecordedGraphs, options)
    assert plain.graphs is plain.evaluation.graph is None
    expected = study(plain, training_type)
    assert_equal(study(graphs, training_type), expected)
    # A level captures its whole batches and its last ones; evaluation is captured once.
    epochs = LEVELS * EPOCHS - (LEVELS - 1) * (training_type == "wr")
    counted = graphs.graphs.graphs
    assert counted.recorded == 2 * LEVELS + 1
    evaluations = epochs * (2 if graphs.average else 1)
    assert counted.replays == epochs * STEPS - 2 * LEVELS * WARM_UP + evaluations - WARM_UP


def test_dropout_draws_the_same():
    plain, graphs = (make_trainer(kind, {}, dropout=0.3) for kind in (None, RecordedGraphs))
    assert_equal(study(graphs, "imp"), study(plain, "imp"))


def test_masks_changed_within_a_level_are_captured_again():
    """Without a fresh optimizer: the graph has the factors of the masks as they were."""
    found = []
    for kind in (None, RecordedGraphs):
        one = make_trainer(kind, {})
        results = []
        for epoch, density in enumerate((1.0, 0.5, 0.5, 0.2)):
            if epoch in (1, 3):
                prune(one.model, "mag", density)
                apply_masks(one.model)
            results.append(train_epoch(one, 0, epoch))
        assert all((param[~mask] == 0).all() for _, param, mask in masked_params(one.model))
        found.append([*results, one.model.state_dict()])
    assert_equal(found[1], found[0])
    # Whole batches: dense, at 0.5, at 0.2; evaluation at its fourth call.
    assert one.graphs.graphs.recorded == 3 + 1


def test_a_fresh_optimizer_is_captured_again():
    """The masks as they were: the graph has the momentum of the optimizer before."""
    found = []
    for kind in (None, RecordedGraphs):
        one = make_trainer(kind, {})
        results = []
        for epoch in range(3):
            if epoch == 1:
                one.restart()
            results.append(train_epoch(one, 0, epoch))
        found.append([*results, one.model.state_dict(), dict(enumerate(momenta(one.optimizer_state_dict())))])
    assert_equal(found[1], found[0])
    assert one.graphs.graphs.recorded == 2


def momenta(state: dict) -> list[Tensor]:
    return [value["momentum_buffer"] for value in state["optimizer"]["state"].values()]


@pytest.mark.parametrize(
    ("at", "name"), [(1, "sgd"), (4, "sgd"), (7, "sgd"), (18, "sgd"), (19, "sgd"), (4, "adam"), (18, "adamw")]
)
def test_stopped_in_mid_epoch_and_taken_up_again(at, name):
    """In the warm-up, before a captured step, before a last batch; with dropout, whose draws go on."""
    options = {"optimizer": {"optimizer_name": name, "lr": 0.1 if name == "sgd" else 0.01}}
    whole = make_trainer(RecordedGraphs, options, dropout=0.3)
    expected = [train_epoch(whole, 0, epoch) for epoch in range(EPOCHS)]

    first = make_trainer(RecordedGraphs, options, dropout=0.3)
    epoch, step = divmod(at, STEPS)
    found = [train_epoch(first, 0, earlier) for earlier in range(epoch)]
    tally = train_epoch(first, 0, epoch, stop=lambda steps: steps == step)
    state = copy.deepcopy((first.state_dict(), tally.state_dict(first.ctx)))

    torch.manual_seed(123)
    second = make_trainer(RecordedGraphs, options, dropout=0.3)
    second.load_state_dict(state[0])
    tally = second.new_tally()
    tally.load_state_dict(state[1], second.ctx)
    assert second.train_epoch(0, epoch, tally, lambda steps: False)
    found.append(finish_epoch(second, 0, epoch, tally))
    found += [train_epoch(second, 0, later) for later in range(epoch + 1, EPOCHS)]
    assert_equal([*found, second.model.state_dict()], [*expected, whole.model.state_dict()])


def test_a_state_saved_between_two_replays_is_that_of_the_step():
    states = []
    for kind in (None, RecordedGraphs):
        one = make_trainer(kind, {}, dropout=0.3)
        train_epoch(one, 0, 0)
        one.seed_draws(0, 1)
        tally, kept = one.new_tally(), []

        def stop(steps: int, one=one, tally=tally, kept=kept) -> bool:
            kept.append(copy.deepcopy({**one.state_dict(), "tally": tally.state_dict(one.ctx)}))
            return False

        one.train_epoch(0, 1, tally, stop)
        states.append(kept)
    for mine, theirs in zip(*states, strict=True):
        assert mine["tally"]["step"] == theirs["tally"]["step"]
        for name in ("losses", "correct", "rng"):
            assert str(mine["tally"][name]) == str(theirs["tally"][name])
        assert_equal([mine["model"]], [theirs["model"]])
        assert all(map(torch.equal, momenta(mine["optimizer"]), momenta(theirs["optimizer"])))
        assert mine["optimizer"]["optimizer"]["param_groups"] == theirs["optimizer"]["optimizer"]["param_groups"]


def test_evaluation_sees_the_weights_of_now():
    plain, graphs = make_trainer(None, {}), make_trainer(RecordedGraphs, {})
    for _ in range(WARM_UP + 2):
        assert graphs.evaluate() == plain.evaluate()
        for one in (plain, graphs):
            with torch.no_grad():
                one.model.fc.weight.mul_(-1.5)
                one.model.bn1.running_mean.add_(0.1)
    assert graphs.graphs.graphs.recorded == 1
    assert graphs.model.training is False


# --- where there can be no graphs ------------------------------------------------------------------------------------


def test_a_network_that_waits_for_the_device_is_not_captured(capsys):
    """It trains on, as it stands."""
    extra = lambda x: x * (2.0 if x.sum().item() > 0 else 1.0)  # noqa: E731
    plain, graphs = (make_trainer(kind, {}, extra=extra) for kind in (None, RecordedGraphs))
    assert_equal(study(graphs, "imp"), study(plain, "imp"))
    assert graphs.graphs.graphs.recorded == 0
    assert (
        capsys.readouterr().err.count("note: experiment_params.cuda_graphs: auto is off here: the network waits") == 1
    )


@pytest.mark.parametrize("extra", [lambda x: x * len(x.sum(1).tolist()), lambda x: x * int(x.numel() * x.sum())])
def test_asked_for_it_ends_the_run(extra):
    one = make_trainer(RecordedGraphs, {"experiment_params": {"cuda_graphs": "on"}}, extra=extra)
    with pytest.raises(RunError, match="cuda_graphs: on is not possible: the network waits"):
        train_epoch(one, 0, 0)


def unsuited(trainer: Trainer) -> Trainer:
    """Its step waits for nothing but cannot be captured: after `backward`, a tensor is made of a number of Python's."""
    trainer._clip_gradients = lambda: [param.grad.mul_(torch.tensor(0.5)) for param in trainer.params]
    return trainer


def test_after_a_capture_that_fails_training_goes_on(capsys):
    """With auto, without the gradients that were made meanwhile: they hold no values."""
    plain, graphs = (unsuited(make_trainer(kind, {}, dropout=0.3)) for kind in (None, RecordedGraphs))
    assert_equal(study(graphs, "imp"), study(plain, "imp"))
    note = "note: experiment_params.cuda_graphs: auto is off here: capturing failed (operation not permitted"
    assert capsys.readouterr().err.count(note) == 1
    assert graphs.graphs.graphs.recorded == 0


def test_a_capture_that_fails_ends_the_run_where_it_is_asked_for():
    one = unsuited(make_trainer(RecordedGraphs, {"experiment_params": {"cuda_graphs": "on"}}))
    with pytest.raises(RunError, match=r"cuda_graphs: on is not possible: capturing failed .*lift_fresh"):
        train_epoch(one, 0, 0)


def test_other_warnings_are_shown(monkeypatch):
    """Where waits for the device are looked for, which torch tells by warnings."""
    for name in ("get", "set"):
        monkeypatch.setattr(torch.cuda, f"{name}_sync_debug_mode", lambda *_: None)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with CudaGraphs(CPU, required=False).note_waits() as waits:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
            warnings.warn("of old", DeprecationWarning, stacklevel=1)
    assert len(waits) == 1 and [str(warning.message) for warning in shown] == ["of old"]


# --- what the host does meanwhile ------------------------------------------------------------------------------------


class Late(RecordedGraphs):
    """A device that does nothing before it is waited for."""

    def __init__(self, device: torch.device, required: bool):
        super().__init__(device, required)
        self.done, self.furthest = 0, 0

    def mark(self) -> "Late.Mark":
        return Late.Mark(self, self.steps)

    def pace(self) -> None:
        super().pace()
        self.furthest = max(self.furthest, self.steps - self.done)

    class Mark:
        def __init__(self, graphs: "Late", steps: int):
            self.graphs, self.steps = graphs, steps

        def synchronize(self) -> None:
            self.graphs.done = self.steps


def test_the_host_is_not_far_ahead_of_the_device():
    """Over epochs of five steps too."""
    one = make_trainer(Late, {})
    for epoch in range(5):
        for level in range(6):
            tally = one.new_tally()
            one.train_epoch(level, epoch, tally, lambda steps: False)
    paced = one.graphs.graphs
    assert paced.steps == 150 and paced.done == 112  # marks at 112, 128 and 144: the two last are not waited for
    assert 2 * STEPS_PER_MARK <= paced.furthest < 3 * STEPS_PER_MARK


@pytest.mark.parametrize("recipe", [(True, True), (False, True), (True, False), (False, False)])
def test_nothing_is_drawn_before_it_is_needed(monkeypatch, recipe):
    drawn = []
    monkeypatch.setattr(MemoryTrainLoader, "draws", lambda *words: drawn.append(words))
    one = make_trainer(RecordedGraphs, {"recipe": recipe})
    assert not drawn
    monkeypatch.undo()
    assert one.graphs.draws.shape == one.data.train.draws(0, 0).shape


class Anywhere(CudaGraphs):
    """As if there were a GPU, as far as the decision goes."""

    @staticmethod
    def missing(device: torch.device) -> str:
        return ""


class NotInMemory:
    num_images = batch_size = steps_per_epoch = 8


@pytest.mark.parametrize(
    ("reason", "kind", "world", "dtype", "in_memory"),
    [
        ("there is no GPU", CudaGraphs, 1, None, True),
        ("there are several processes", Anywhere, 2, None, True),
        ("precision is fp16", Anywhere, 1, torch.float16, True),
        ("the images are not held in memory", Anywhere, 1, torch.bfloat16, False),
    ],
)
def test_reasons(capsys, reason, kind, world, dtype, in_memory):
    data = make_trainer(None, {}).data
    data = data if in_memory else Data(NotInMemory(), data.test, 5, (3, 8, 8))
    for device in (CPU, torch.device("cuda")):
        if reason == "there is no GPU" and device.type == "cuda":
            continue
        ctx = Context(world=world, device=device)
        assert choose_graphs(make_config(), ctx, data, dtype, kind) is None
        note = capsys.readouterr().err
        assert f"cuda_graphs: auto is off here: {reason}" in note if device.type == "cuda" else not note
        asked = make_config({"experiment_params": {"cuda_graphs": "on"}})
        with pytest.raises(ConfigError, match=f"experiment_params.cuda_graphs: on is not allowed here: .*{reason}"):
            choose_graphs(asked, ctx, data, dtype, kind)
        off = make_config({"experiment_params": {"cuda_graphs": "off"}})
        assert choose_graphs(off, ctx, data, dtype, kind) is None
        assert capsys.readouterr().err == ""


# --- through the command line ----------------------------------------------------------------------------------------


class Rounded:
    """The learning rates of a GPU."""

    def __call__(self) -> None:
        trainer_module.learning_rate = rounded(trainer_module.learning_rate)


class Emulated(MustBeMet):
    """Graphs, on the CPU."""

    def lay(self) -> None:
        Trainer.graphs_class = RecordedGraphs
        plain = RecordedGraphs.record

        def record(graphs, work, pool):
            self.met()
            return plain(graphs, work, pool)

        RecordedGraphs.record = record


def test_a_run_by_graphs_stopped_and_resumed(fork):
    """Twelve steps per epoch; levels begin at step 17, in the middle of the second epoch."""
    options = {"experiment_params.training_type": "wr", "prune_params.rewind_step": 17}
    plain = fork("plain", trap=Rounded(), **options)
    options["experiment_params.cuda_graphs"] = "on"
    fork("graphs", trap=Both(Rounded(), Emulated(), StopAt(30)), status=143, **options)
    resumed = fork("graphs", resume=True, trap=Both(Rounded(), Emulated()), **options)
    resumed.assert_same_figures(plain)
    assert "note" not in resumed.err


def test_the_plain_harness_says_that_it_has_none(launch):
    options = {"prune_params.num_levels": 1, "experiment_params.cuda_graphs": "on"}
    run = launch("one", program=("-m", "utils.single_gpu_harness"), **options)
    assert "single_gpu_harness: note: experiment_params.cuda_graphs: on has no effect here" in run.err


# --- the emulation itself --------------------------------------------------------------------------------------------


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    return RecordedGraphs(CPU, required=True).capture(work, None)


def test_recording_does_nothing_and_freezes_what_is_no_tensor():
    total, source, numbers, made = torch.zeros(3), torch.ones(3), [5.0], []

    def work() -> None:
        total.add_(source * numbers[0])
        total.add_(torch.rand(3))
        made.append(total + 1)

    torch.manual_seed(1)
    replay = recorded(work)
    assert total.tolist() == [0, 0, 0] and made[0].isnan().all()
    drawn = torch.rand(3)
    torch.manual_seed(1)
    numbers[0] = 7.0
    replay()
    assert torch.equal(total, 5 + drawn) and torch.equal(made[0], total + 1)
    source.fill_(2.0)
    replay()
    assert (total >= 15).all()
    source = torch.full((3,), 100.0)
    total.zero_()
    replay()
    assert (total <= 11).all() and (total >= 10).all(), "another tensor of the same name is not the graph's"


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor(1.0),
    ],
)
def test_reads_and_copies_cannot_be_recorded(work):
    with pytest.raises(RunError, match="capturing failed"):
        recorded(lambda: work(torch.ones(3)))
