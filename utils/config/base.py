"""A checked, frozen config: the merged sources, the checks across options, the notes on options without effect."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from utils.config.derived import derive_levels, name_of_resumed, without_derived
from utils.config.effects import needs_processes, parts_used, without_effect
from utils.config.options import Note, Schema, fault, show
from utils.config.resolving import Legacy, Resolved, Source, check_values, load_parts, merge
from utils.config.rules import CHECKS
from utils.config.run_folder import resumed
from utils.config.sources import parse_words, read_yaml
from utils.config.values import Values
from utils.errors import ConfigError
from utils.output import note, say
from utils.plugins import OPTION, loaded_plugins
from utils.pruning.methods import NO_METHOD

USAGE = """usage: python harness.py [--config FILE | --resume RUN] [--section.key=value ...]

FILE is YAML: sections, with options below them. The command line overrides FILE; FILE overrides the defaults below.
RUN is a run to go on with, by its name in base_dir or by its folder: its own config is the FILE.
On the command line, lists are written 0.5,0.75. Environment variables are not read."""

HELP = ("--help", "-h")

C = TypeVar("C", bound="BaseConfig")


class BaseConfig(Values):
    """The values of all options: ``cfg.section.key``; lists are tuples.

    Attributes:
        schema, legacy: the declarations; they belong to the class.
        notes: for the user, to print once; they take no part in equality and are not dumped.
    """

    schema: ClassVar[Schema]
    legacy: ClassVar[Legacy]
    notes: tuple[Note, ...]

    def __init__(self, values: Mapping[str, Values], notes: Sequence[Note] = ()):
        super().__init__(values)
        vars(self)["notes"] = tuple(notes)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, BaseConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(group for group in vars(self).values() if isinstance(group, Values)))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{section: {key: value}}, all options, lists as lists: the caller's own copy."""
        sections = {name: vars(group) for name, group in vars(self).items() if isinstance(group, Values)}
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for name, values in sections.items()
        }

    def value(self, path: str) -> Any:
        """The value of ``section.key``."""
        section, key = path.split(".")
        return getattr(getattr(self, section), key)

    def replace(self: C, overrides: Mapping[str, Mapping[str, Any]]) -> C:
        """A copy with some options changed, checked again.

        Raises:
            ConfigError: with every fault.
        """
        return self.build([Source("code", without_derived(self.to_dict())), Source("code", overrides)])

    @classmethod
    def make(cls: type[C], overrides: Mapping[str, Mapping[str, Any]] | None = None) -> C:
        """The defaults, with `overrides`, {section: {key: value}}, on top.

        Raises:
            ConfigError: with every fault.
        """
        return cls.build([Source("code", overrides if overrides is not None else {})])

    @classmethod
    def load(cls: type[C], argv: Sequence[str] | None = None) -> C:
        """The config of a command line (``sys.argv[1:]`` if None). ``--help`` prints all options and exits with 0.

        Raises:
            ConfigError: with every fault of the file and the command line. Nothing has been created.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        helped = any(word in HELP for word in words)
        files, values, faults = parse_words([word for word in words if word not in HELP], cls.schema)
        data: dict = {}
        place: dict = {}
        complete = True
        try:
            if "resume" in files:
                data, place, found = resumed(files["resume"], values, cls.schema.default("experiment_params.base_dir"))
                faults += found
            elif "config" in files:
                data, repeats = read_yaml(files["config"])
                faults += repeats
        except ConfigError as error:
            faults += error.faults
            complete = False
        sources = [Source("file", data), Source("file", place), Source("cli", values)]
        if helped:
            cls._help(sources)
        return cls.build(sources, faults, complete)

    @classmethod
    def _help(cls, sources: Sequence[Source]) -> NoReturn:
        """Print all options, with the names that the sources' plugins add, and exit with 0, whatever faults there are.

        A plugin that cannot be loaded is told on stderr.
        """
        found = Resolved(raw=merge(cls.schema, sources, cls.legacy).raw)
        load_parts(cls.schema, found)
        note(*found.faults)
        say(cls.schema.help_text(USAGE))
        raise SystemExit(0)

    @classmethod
    def build(cls: type[C], sources: Sequence[Source], faults: Sequence[str] = (), complete: bool = True) -> C:
        """Merge and check the sources.

        Args:
            faults: those found while the sources were read.
            complete: whether all sources could be read. Without one of them, the checks across options are skipped:
                they would report false faults.

        Raises:
            ConfigError: with every fault.
        """
        found = merge(cls.schema, sources, cls.legacy)
        check_values(cls.schema, found, all_parts=load_parts(cls.schema, found))
        _rewind_within_level(found)
        faults = [*faults, *found.faults, *derive_levels(found, cls.schema), *name_of_resumed(found)]
        if complete:
            faults += [*_faults_across_options(found), *_faults_of_options_left_out(found)]
        if faults:
            raise ConfigError(faults)
        config = cls(found.values)
        return cls(found.values, [*found.notes, *_notes_without_effect(config, found), *_notes_on_plugins(config)])


def _faults_across_options(found: Resolved) -> list[str]:
    """Invalid options are absent; a check that reads one is skipped."""
    faults = []
    options = Values(found.values)
    for check in CHECKS:
        try:
            for path, allowed in check(options):
                section, key = path.split(".")
                faults.append(fault(path, getattr(found.values[section], key), allowed))
        except AttributeError as error:
            if error.name not in found.bad:  # a slip in the check itself
                raise
    return faults


def _rewind_within_level(found: Resolved) -> None:
    """With wr, a rewind_epoch that nothing sets is a tenth of a level that is too short for the default.

    The default itself stays: a config of older code that leaves it out is the same experiment.
    """
    p, e = vars(found.values["prune_params"]), vars(found.values["experiment_params"])
    epochs = e.get("epochs_per_level", 0)
    waits = e.get("training_type") == "wr" and not p.get("rewind_step")
    if waits and "prune_params.rewind_epoch" not in found.origin and epochs <= p["rewind_epoch"]:
        p["rewind_epoch"] = max(1, epochs // 10)


def _faults_of_options_left_out(found: Resolved) -> list[str]:
    """Pruning at initialization needs a density; a config that says 1 itself, as one of older code may, is kept."""
    method = getattr(found.values["prune_params"], "er_method", NO_METHOD)
    if method == NO_METHOD or "prune_params.er_init" in found.origin:
        return []
    return [f"prune_params.er_init: missing: er_method {method} prunes to this density, above 0 and at most 1"]


def _notes_without_effect(config: BaseConfig, found: Resolved) -> list[Note]:
    """A note for each option that was set and has no effect.

    An option that a file leaves at its default gets none (a dumped config holds them all). Nor does a file's
    rewind_epoch without wr: it is there for the day someone adds ``--experiment_params.training_type=wr``.
    """
    notes = []
    for path, why in without_effect(config, config.schema):
        value, origin = config.value(path), found.origin.get(path)
        waiting = path == "prune_params.rewind_epoch" and config.experiment_params.training_type != "wr"
        changed = value != config.schema.default(path) and not waiting
        if origin == "cli" or (origin is not None and changed):
            notes.append(Note(path, f"{show(value)} has no effect: {why}"))
    return notes


def _notes_on_plugins(config: BaseConfig) -> list[Note]:
    """A note for each plugin that adds nothing, or nothing that is used."""
    notes = []
    for plugin in loaded_plugins(config.experiment_params.plugins):
        if not parts_used(config, plugin.record()["adds"]):
            names = ", ".join(line.name for line in plugin.lines)
            why = f"it adds {names}, which no option names" if names else "it adds no line to a table"
            notes.append(Note(OPTION, f"{plugin.path} has no effect: {why}"))
    return notes


def unused_alone(config: BaseConfig) -> list[Note]:
    """Notes on options that need several processes, for a run whose nproc 0 has turned out to be one process.

    Where the config itself asks for one process, its own notes say so already.
    """
    if config.dist_params.nproc != 0 or not config.dist_params.distributed:
        return []
    changed = [path for path in needs_processes(config.schema) if config.value(path) != config.schema.default(path)]
    return [Note(path, f"{show(config.value(path))} has no effect: there is one process") for path in changed]
