"""All settings of all cells, checked once: when a run starts, before anything is read or trained.

`check` compares every cell's configuration with its schema: what experiments share (`core.settings`), what the module
of the experiment adds (`SETTINGS`, a `Checked` for the top of the configuration), and the class of every node that is
built from one (`_target_`). Then it asks whether the settings fit together, the module's own `check(cfg)` last. Numbers
that are written as text or as 1e8 become numbers, so that the rest of a run sees one spelling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from inspect import Parameter, signature
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Literal, get_type_hints

from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.building import build
from core.checked import Checked, converted, nearest, refuse
from core.errors import UserError
from core.methods.base import DictionaryMethod
from core.methods.dictionary import Dictionary
from core.methods.settings import Settings, settings_of
from core.models import loading
from core.models.pair import PairSettings
from core.settings import Shared
from core.streams.source import Source, source_of

TABLES = ("at", "grid")  # checked where their values are used, and by the sweeper
NOT_SETTINGS = ("hydra",)
LOADERS = "core.interop."  # below it are functions that read a dictionary made elsewhere
OF_HYDRA: dict[str, Any] = {  # what a node may say of how it is built
    "_target_": str | None,
    "_convert_": Literal["none", "partial", "object", "all"] | None,
    "_recursive_": bool | None,
}
TEXTS = ("data", "facts", "dialogues")
BUILT = {"method", "stream", *TEXTS}  # groups that are built from a class
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
PARTS = re.compile(r"[^.\[\]]+")  # of a dotted name
INNER = re.compile(r"\$\{([\w.]+)\}")
WHOLE = re.compile(r"\$\{(\.*)([\w.\[\]]+)\}")

Plain = dict[str, Any]


def check(cells: Sequence[DictConfig]) -> None:
    """Raises UserError that lists what is wrong with the settings of these cells. Otherwise writes each number into the
    configurations as a number."""
    lines: Counter[str] = Counter()
    for cfg in cells:
        lines.update(problems(cfg))
    if not lines:
        return
    shown = [line if n == len(cells) else f"{line} (In {n} of {len(cells)} cells.)" for line, n in lines.items()]
    head = [] if len(shown) == 1 else [f"{len(shown)} settings will not do:"]
    raise UserError("\n  ".join([*head, *shown]))


def problems(cfg: DictConfig) -> list[str]:
    """What is wrong with one cell's settings, a line for each. If nothing is, its numbers are written as numbers."""
    cell = Cell(cfg)
    module = cell.check_parts()
    if not cell.problems:
        cell.check_together(module)
    if not cell.problems:
        cell.write_numbers()
    return cell.lines()


@dataclass
class Cell:
    """One configuration, and what is found wrong with it."""

    cfg: DictConfig
    values: Plain = field(default_factory=dict)  # all of it, without interpolations
    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # settings whose value is not there
    checked: dict[str, Plain] = field(default_factory=dict)  # node -> its settings, converted
    methods: dict[str, Settings] = field(default_factory=dict)  # by node: the methods that are trained

    def check_parts(self) -> ModuleType | None:
        """Every setting by itself. Returns the experiment's module if there is one."""
        names = [str(name) for name in self.cfg if name not in NOT_SETTINGS]
        tables: Plain = {name: {} for name in TABLES if isinstance(self.cfg.get(name), DictConfig)}
        self.values = {n: tables[n] if n in tables else self._value(self.cfg, n, n) for n in names}
        module = self._module(self.values.get("module"))
        own: type[Checked] | None = getattr(module, "SETTINGS", None)
        added = {entry.name for entry in fields(own)} if own else set()
        shared = {entry.name for entry in fields(Shared)} - added
        for name in self.values.keys() - added - shared if own else ():  # without a schema the YAML's word stands
            self.problems.append(f"{name}: there is no such setting.{nearest(name, sorted(added | shared))}")
        for kind, chosen in ((own, added), (Shared, shared)):
            if kind is not None:
                others = {entry.name: None for entry in fields(kind) if entry.name not in chosen}
                self._settings(kind, {n: value for n, value in self.values.items() if n in chosen} | others)
        for name in BUILT - added:
            if isinstance(node := self.values.get(name), dict) and "_target_" not in node:
                self.problems.append(f"{name}._target_: this setting is missing.")
        self._model(self.values.get("model"))
        self._pair(self.values.get("pair"))
        for path, node in sorted(targets(self.values), key=lambda one: -one[0].count(".")):  # inner ones first
            self.check_target(path, node, path.rpartition(".")[2])
        return module

    def check_together(self, module: ModuleType | None) -> None:
        """What is right alone and does not fit together."""
        values = self.values
        batches: dict[str, int | None] = {}
        if isinstance(stream := values.get("stream"), dict) and "_target_" in stream:
            source = source_of(stream, values, values["trainer"]["devices"])
            batches["method"] = source.calibration_batches
            if source.devices > 1 and values["cache"]["dir"] is not None:
                words = f"the cache serves one device, not trainer.devices={source.devices}. Add cache=none."
                self.problems.append(f"cache.dir: {words}")
            self._try(source.check_devices)
        if isinstance(meta := values.get("meta"), dict):
            batches["meta.method"] = meta.get("calibration_batches")
        for path, n in batches.items():
            if n == 0 and path in self.methods and self.methods[path].needs_calibration:
                where = "stream" if path == "method" else "meta"
                words = f"0 must be 1 or more: {path} measures its threshold of inference on these batches."
                self.problems.append(f"{where}.calibration_batches: {words}")
        own = getattr(module, "check", None)
        if own is not None and not self.problems:
            self.write_numbers()
            try:
                self._try(lambda: own(self.cfg))
            except OmegaConfBaseException as error:  # a setting that the experiment asks for, such as one of `stream`
                self.problems.append(f"{error.full_key}: the experiment needs this setting, and it is not there.")

    def write_numbers(self) -> None:
        """Numbers that were written as texts, or as floats where whole numbers are meant, become numbers."""
        for node, plain in self.checked.items():
            for path, value in numbers(plain, value_at(self.values, node), node):
                OmegaConf.update(self.cfg, origin_of(self.cfg, path) or path, value, merge=False)

    def lines(self) -> list[str]:
        """The problems, each once: where a value is taken from another setting, at that setting, or saying so."""
        named = {line.partition(":")[0] for line in self.problems}
        kept = [self._absence(path) for path in self.absent if "scale" not in named or not self._asks_scale(path)]
        for line in self.problems:
            name = line.partition(":")[0]
            origin = origin_of(self.cfg, name)
            if origin not in named and not any(is_within(name, path) for path in self.absent):
                kept.append(line if origin is None else f"{line} The value comes from {origin}.")
        return list(dict.fromkeys(kept))

    # ---- values

    def _asks_scale(self, path: str) -> bool:
        return "${scale}" in (raw_of(self.cfg, path) or "")

    def _value(self, parent: DictConfig | ListConfig, key: Any, path: str) -> Any:
        """The value of a setting, without interpolations. One that is not there is noted, and None."""
        try:
            if not OmegaConf.is_missing(parent, key):
                value: Any = parent[key]
                if isinstance(value, DictConfig):
                    return {str(name): self._value(value, name, f"{path}.{name!s}") for name in value}
                if isinstance(value, ListConfig):
                    return [self._value(value, index, f"{path}[{index}]") for index in range(len(value))]
                return value
        except OmegaConfBaseException:
            pass
        if path.partition(".")[0] not in TABLES:
            self.absent.append(path)
        return None

    def _absence(self, path: str) -> str:
        """What is wrong with a setting whose value is not there."""
        raw, origin = raw_of(self.cfg, path), origin_of(self.cfg, path)
        if origin in self.absent or (raw is None and origin is None):
            name = origin or path
            return f"{name}: this setting must be given: {name}=<value>."
        return f"{path}: its value, {raw or origin}, cannot be found."

    # ---- parts

    def _settings(self, kind: type[Checked], values: Plain, node: str = "") -> None:
        """The settings of a node by their schema."""
        try:
            made = kind.of(values, node)
        except UserError as error:
            self.problems += str(error).splitlines()
        else:
            own = {name: value for name, value in made.plain().items() if values.get(name) is not None}
            self.checked[node] = self.checked.get(node, {}) | own

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except UserError as error:
            self.problems += str(error).splitlines()

    def _module(self, name: Any) -> ModuleType | None:
        if not isinstance(name, str) or not name:
            return None  # the schema says it
        try:
            module = import_module(name)
        except (ImportError, ValueError, TypeError) as error:
            if isinstance(error, ImportError) and error.name and not name.startswith(error.name):
                raise  # the module is there, and what it imports is not
            self.problems.append(f"module: {name!r} must be a module, as each YAML of conf/experiment has one.")
            return None
        if not hasattr(module, "run"):
            self.problems.append(f"module: {name!r} must have a function run(cfg).")
        return module

    def _model(self, node: Any) -> None:
        if not isinstance(node, dict):
            return
        if not any(is_within(path, "model") for path in self.absent):
            self._settings(loading.Settings, node, "model")
        device = node.get("device")
        if isinstance(device, str):
            self._try(lambda: loading.chosen_device(device))

    def _pair(self, node: Any) -> None:
        if isinstance(node, dict) and not any(is_within(path, "pair") for path in self.absent):
            self._settings(PairSettings, node, "pair")
            if isinstance(device := node.get("device"), str):
                try:
                    loading.chosen_device(device)
                except UserError as error:
                    self.problems.append(str(error).replace("model.device", "pair.device"))

    def check_target(self, path: str, node: Plain, role: str) -> None:
        """A node that is built from a class, by that class's own rules. `role`: what it is for, such as method."""
        name = node["_target_"]
        try:
            kind = resolve_name(name)
        except Exception as error:  # whatever a wrong name makes of an import
            reason = str(error).partition("\n")[0]
            self.problems.append(f"{path}._target_: {name!r} must be the full name of a class or function ({reason}).")
            return
        is_dictionary = isinstance(kind, type) and issubclass(kind, Dictionary)
        if role == "method" and not is_dictionary and not str(name).startswith(LOADERS):
            self.problems.append(f"{path}._target_: {name!r} must be a dictionary-learning method (core.methods).")
            return
        if isinstance(kind, type) and issubclass(kind, DictionaryMethod):
            self._method(path, node, role)
        elif role == "stream" or (isinstance(kind, type) and issubclass(kind, Source)):
            self._source(path, node)
        else:
            before = len(self.problems)
            self._call(path, kind, node, role, complete=role in (*TEXTS, "method"))
            if role in TEXTS and len(self.problems) == before:
                self._build(path, self._converted(path, node), role)

    def _method(self, path: str, node: Plain, role: str) -> None:
        if role == "method" and node.get("d_model") is None:
            node = node | {"d_model": 1}  # the width is left to the model, whose files tell it
        try:
            made = settings_of(node, path)
        except UserError as error:
            self.problems += str(error).splitlines()
            return
        self.methods[path] = made
        self.checked[path] = {name: value for name, value in made.plain().items() if name != "d_model"}

    def _source(self, path: str, node: Plain) -> None:
        trainer = self.values.get("trainer")
        devices = trainer.get("devices") if isinstance(trainer, dict) else None
        try:
            made = source_of(node, self.values, devices if type(devices) is int else 1)
        except UserError as error:
            self.problems += str(error).splitlines()
            return
        self.checked[path] = {name: value for name, value in made.plain().items() if name in node}

    def _call(self, path: str, kind: Any, node: Plain, role: str, complete: bool) -> None:
        """The arguments of a class or function, by its annotations. `complete`: none may be missing."""
        try:
            parameters = signature(kind).parameters
            hints = get_type_hints(getattr(kind, "__init__") if isinstance(kind, type) else kind)  # noqa: B009
        except (TypeError, ValueError):
            self.problems.append(f"{path}._target_: {node.get('_target_')!r} must be a class or function of core.")
            return
        names = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
        of_training = {entry.name for entry in fields(Settings)} if role == "method" else set()
        plain: Plain = {}
        before = len(self.problems)
        for key, kind_of_key in OF_HYDRA.items():
            converted(node.get(key), kind_of_key, f"{path}.{key}", self.problems)
        for key, value in node.items():
            if key in OF_HYDRA or (key not in names and key in of_training):
                continue  # experiments set the learning rate and its like for every method
            where = f"{path}.{key}"
            if key not in names:
                self.problems.append(f"{where}: there is no such setting.{nearest(key, names, f'{path}.')}")
            elif isinstance(value, dict) and "_target_" in value:
                self.check_target(where, value, role)
            else:
                value = plain[key] = converted(value, hints.get(key, Any), where, self.problems)
        required = [name for name in names if parameters[name].default is Parameter.empty] if complete else []
        self.problems += [f"{path}.{name}: this setting is missing." for name in required if name not in node]
        if len(self.problems) == before:
            self.checked[path] = plain

    def _converted(self, path: str, node: Plain) -> Plain:
        """A node with its checked values, and those of the nodes in it."""
        inner = {
            name: self._converted(f"{path}.{name}", value)
            for name, value in node.items()
            if isinstance(value, dict) and f"{path}.{name}" in self.checked
        }
        return node | self.checked.get(path, {}) | inner

    def _build(self, path: str, node: Plain, role: str) -> None:
        """Build what costs nothing to build: its class knows more rules. Its messages name settings as if it stood at
        `role`, or at `data`."""
        try:
            build(node)
        except UserError as error:
            for line in str(error).splitlines():
                own = next((name for name in (role, "data") if line.startswith(f"{name}.")), None)
                self.problems.append(line if own is None else f"{path}{line.removeprefix(own)}")
        except InstantiationException as error:
            cause = str(error.__cause__ or error).partition("\n")[0]
            self.problems.append(f"{path}: these settings do not fit together ({cause}).")


def check_method(node: Plain, path: str) -> None:
    """Raises UserError for wrong settings of a method, whose names in the configuration begin with `path`. A d_model of
    null is left to the model."""
    cell = Cell(DictConfig({}))
    cell.check_target(path, node | ({"d_model": 1} if node.get("d_model", 1) is None else {}), "method")
    refuse(cell.problems)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Plain]]:
    """The nodes that are built from a class, with their names; not those inside another."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from targets(item, f"{path}[{index}]")
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    elif isinstance(node, dict):
        for name, item in node.items():
            if path or name not in TABLES:
                yield from targets(item, f"{path}.{name}" if path else name)


def numbers(plain: Any, raw: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting of `raw` whose numbers `plain` has in another spelling."""
    if isinstance(plain, dict) and isinstance(raw, dict):
        for name in plain.keys() & raw.keys():
            yield from numbers(plain[name], raw[name], f"{path}.{name}" if path else name)
    elif repr(new := respelled(plain, raw)) != repr(raw):
        yield path, new


def respelled(plain: Any, raw: Any) -> Any:
    """`raw` with the numbers of `plain`, where it has texts, or floats for whole numbers."""
    if isinstance(plain, dict) and isinstance(raw, dict):
        return {name: respelled(plain.get(name, value), value) for name, value in raw.items()}
    if isinstance(plain, list) and isinstance(raw, list):
        return [respelled(*pair) for pair in zip(plain, raw, strict=True)]
    written_otherwise = isinstance(raw, str) or (isinstance(raw, float) and isinstance(plain, int))
    return plain if written_otherwise and isinstance(plain, int | float) else raw


def value_at(values: Plain, path: str) -> Any:
    """The part of plain values at a dotted name."""
    for name in path.split(".") if path else ():
        values = values[name]
    return values


def raw_of(cfg: DictConfig, path: str) -> str | None:
    """The interpolation that stands at a dotted name, such as `${at.n_rows.${scale}}`; None if there is none."""
    node: Any = cfg
    for name in PARTS.findall(path):
        if not isinstance(node, DictConfig | ListConfig) or node._is_none() or node._is_missing():
            return None
        if node._is_interpolation():
            return None
        if isinstance(node, DictConfig):
            node = node._get_node(name, validate_access=False)
        else:
            node = node._get_node(int(name)) if name.isdecimal() and int(name) < len(node) else None
        if node is None:
            return None
    raw = node._value()
    return raw if isinstance(raw, str) and "${" in raw else None


def origin_of(cfg: DictConfig, path: str) -> str | None:
    """The setting whose value another one takes; None if it has its own."""
    parts = PARTS.findall(path)
    for n in range(1, len(parts) + 1):
        here = ".".join(parts[:n])
        raw = raw_of(cfg, here)
        if raw is None:
            continue
        while raw.count("${") > 1:  # ${at.n_rows.${scale}}: the inner one is a plain value
            inner = INNER.search(raw)
            try:
                value = OmegaConf.select(cfg, inner[1]) if inner else None
            except OmegaConfBaseException:
                return None
            if inner is None or not isinstance(value, str):
                return None
            raw = raw[: inner.start()] + value + raw[inner.end() :]
        whole = WHOLE.fullmatch(raw)
        if whole is None:
            return None
        above = parts[: n - len(whole[1])] if whole[1] else []
        found = ".".join([*above, whole[2], *parts[n:]])
        return origin_of(cfg, found) or found
    return None


def is_within(name: str, path: str) -> bool:
    return name == path or name.startswith((f"{path}.", f"{path}["))
