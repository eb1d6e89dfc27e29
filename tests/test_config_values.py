"""harness_params.Config: frozen, equal by value, picklable; what is dumped reads back equal."""

import pickle

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from harness_params import SCHEMA, dump_yaml, load_config, make_config
from utils.errors import ConfigError


def test_config_is_frozen_equal_by_value_and_picklable():
    cfg = load_config(["--prune_params.rewind_epoch=3"])
    with pytest.raises(AttributeError, match="read-only"):
        cfg.optimizer.lr = 1.0
    with pytest.raises(AttributeError, match="read-only"):
        cfg.optimizer = None
    with pytest.raises(AttributeError, match="read-only"):
        del cfg.optimizer.lr
    with pytest.raises(AttributeError, match="learning_rate"):
        _ = cfg.optimizer.learning_rate
    copy = pickle.loads(pickle.dumps(cfg))
    assert copy == cfg
    assert hash(copy) == hash(cfg)
    assert copy.notes == cfg.notes != ()
    assert cfg != make_config()
    error = ConfigError(["a", "b"])
    assert pickle.loads(pickle.dumps(error)).faults == ["a", "b"]


def test_to_dict_is_the_callers_own():
    cfg = make_config({"prune_params": {"exclude": ["fc"]}})
    nested = cfg.to_dict()
    nested["prune_params"]["exclude"].append("conv1")
    nested["optimizer"]["lr"] = 7
    assert cfg.prune_params.exclude == ("fc",)
    assert cfg.optimizer.lr == 0.1


def test_replace_is_checked_and_leaves_the_original():
    cfg = make_config()
    assert cfg.replace({"optimizer": {"lr": 1}}).optimizer.lr == 1.0
    assert cfg.optimizer.lr == 0.1
    assert cfg.replace({}) == cfg
    assert cfg.replace({"experiment_params": {"num_levels": 3}}).prune_params.num_levels == 3
    for bad in (
        {"optimizer": {"lr": -1}},
        {"optimizer": {"lrr": 1}},
        {"dataset": {"num_classes": 3}},
        {"optimizer": 1},
        3,
    ):
        with pytest.raises(ConfigError):
            cfg.replace(bad)


def _value(checker):
    """Strategy of values that `checker` allows, from its own bounds."""
    name = type(checker).__name__
    if name == "Int":
        numbers = st.integers(checker.low, checker.high if checker.high is not None else 10**12)
        return numbers | st.just(0) if checker.or_zero else numbers
    if name == "Float":
        return st.floats(
            max(checker.low, -1e300),
            min(checker.high, 1e300),
            exclude_min=checker.open_low,
            exclude_max=checker.open_high,
        )
    if name == "Bool":
        return st.booleans()
    if name in ("Choice", "Switch"):
        return st.sampled_from(checker.choices)
    text = st.text(
        st.characters(exclude_categories=["C", "Z"]) | st.sampled_from("'\"#:-~[]{}*&!%@`,|> nul0123456789.e")
    )
    text = text.filter(lambda t: t == t.strip() and "~" not in t[:1])
    if name == "Word":
        return text.filter(lambda t: t and not any(c.isspace() for c in t))
    if name == "Pair":
        return st.builds("{}:{}".format, st.sampled_from(["fc3", "conv*", "a:b", "[x]"]), _value(checker.value))
    if name == "List":
        return st.lists(_value(checker.entry), max_size=4)
    if name in ("RunName", "RunPath"):
        bad = ("/", "\\", "..")
        ok = text.filter(lambda t: not t.startswith(".") and not any(b in t for b in bad) and len(t.encode()) <= 200)
        return ok.filter(lambda t: t.lower() not in ("none", "null"))
    assert name == "FilePath"
    return text if checker.optional else text.filter(bool)


@st.composite
def _valid_options(draw):
    """Any options that pass each alone, with those that are checked together put right."""
    options = {}
    for (section, key), option in SCHEMA.entries.items():
        if draw(st.booleans()):
            options.setdefault(section, {})[key] = draw(_value(option.checker))
    for section, keys in {
        "dataset": "num_classes loader resolution eval_resolution alternate_flip train_beton val_beton "
        "start_resolution end_resolution validation_images randaugment",
        "dist_params": "nproc",
        "model_params": "model_args",
        "experiment_params": "resume_level training_type cuda_graphs cycles plugins",
        "prune_params": "prune_rate num_levels target_density er_init scope",
        "optimizer": "milestones warmup_epochs cooldown_epochs lr_min nesterov",
    }.items():
        for key in keys.split(" "):
            options.get(section, {}).pop(key, None)
    if draw(st.booleans()):
        milestones = sorted(draw(st.sets(st.floats(1e-9, 0.999), max_size=3)))
        options.setdefault("optimizer", {}).update(scheduler_type="MultiStepLRWarmup", milestones=milestones)
    if options.get("ticket_params", {}).get("source") and options["ticket_params"].get("mask") != "none":
        options.get("prune_params", {}).pop("er_method", None)  # a ticket brings its own mask
    if "er_method" in options.get("prune_params", {}):
        options["prune_params"]["er_init"] = 0.5
    if "save_steps" in options.get("prune_params", {}):
        options["prune_params"]["save_steps"] = sorted(set(options["prune_params"]["save_steps"]))
    return options


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(options=_valid_options())
def test_dumped_config_reads_back_equal(tmp_path, options):
    try:
        cfg = make_config(options)
    except ConfigError as error:
        assume("optimizer.milestones" not in str(error))  # two fractions of E that round to one place
        raise
    for section, values in options.items():
        for key, value in values.items():
            assert getattr(getattr(cfg, section), key) == (tuple(value) if isinstance(value, list) else value)
    path = tmp_path / "dump.yaml"
    path.write_text(dump_yaml(cfg), encoding="utf-8")
    again = load_config(["--config", str(path)])
    assert again == cfg
    assert make_config(cfg.to_dict()) == cfg
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == cfg.to_dict(), "plain YAML for other readers too"
