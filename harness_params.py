"""The config of the harness: its sections of options, checked, frozen, read and written.

    cfg = load_config()                                   # the command line: --config FILE --section.key=value ...
    cfg = make_config({"optimizer": {"lr": 0.05}})        # the same checks, from Python
    cfg.optimizer.lr, cfg.replace({"optimizer": {"lr": 0.1}}), dump_yaml(cfg)

Every option is declared once, in the file of its section in utils/config/sections/: what it takes, default, unit,
meaning, role. A config holds values only: no global, no environment variable. An option's role
(utils/config/options.py) settles whether a resume may change it and whether a legend names it. utils/config/rules.py
checks options against each other. No torch is imported: ``--help`` and faults answer at once; data and model check the
rest where they are made.
"""

import yaml

from utils.config.base import BaseConfig, unused_alone
from utils.config.options import Note, Schema
from utils.config.resolving import Legacy
from utils.config.sections import (
    dataset,
    dist_params,
    experiment_params,
    model_params,
    optimizer,
    prune_params,
    ticket_params,
)
from utils.errors import ConfigError, report

__all__ = ["SCHEMA", "Config", "Note", "dump_yaml", "load_config", "make_config", "unused_alone"]

SCHEMA = Schema()
SCHEMA.section("model_params", "the network", **model_params.OPTIONS)
SCHEMA.section("dataset", "the images", **dataset.OPTIONS)
SCHEMA.section("prune_params", "which weights are pruned, how many, how often", **prune_params.OPTIONS)
SCHEMA.section("ticket_params", "what level 0 starts from, if not a fresh network", **ticket_params.OPTIONS)
SCHEMA.section("experiment_params", "the run", **experiment_params.OPTIONS)
SCHEMA.section(
    "optimizer",
    "the optimizer and its learning-rate schedule, both fresh at each level (with wr, both rewound)",
    **optimizer.OPTIONS,
)
SCHEMA.section("dist_params", "processes and how they communicate", **dist_params.OPTIONS)


class Config(BaseConfig):
    """The checked, frozen config of the options above."""

    schema = SCHEMA
    legacy = Legacy(
        unused=frozenset({"experiment_params.expt_setup", "optimizer.num_workers"}),
        moved={"experiment_params.num_levels": "prune_params.num_levels"},
    )


make_config, load_config = Config.make, Config.load


def end_on_faults() -> None:
    """End this process if its command line asks for ``--help`` (exit 0) or has faults (2). No torch is imported."""
    try:
        load_config()
    except ConfigError as error:
        raise SystemExit(report(error)) from None


def dump_yaml(config: Config) -> str:
    """All options as YAML, which ``--config`` reads back to an equal config."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=False, width=10**6)
