"""How stages are wired: nodes in reading order, the work each item needs, and the key of every artifact."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from e4s_models.weights import weight_digest
from storage.keys import canonical, digest
from storage.spelling import near_miss
from tasks.stage import Stage

STAGES = (
    "align",
    "mesh",
    "reenact",
    "parse",
    "light",
    "visibility",
    "encode",
    "tune",
    "swap",
    "recolor",
    "enhance",
    "blend",
    "inpaint",
    "paste",
)
"""Stage names; each is a module `tasks.<name>` with `BACKENDS`, the default first."""

MORE_BACKENDS = {
    "reenact": ("tasks.reenact_network",),
    "encode": ("tasks.encode_regions", "tasks.encode_rgi"),
    "swap": ("tasks.swap_fused", "tasks.swap_codes", "tasks.swap_rgi"),
    "recolor": ("tasks.recolor_lab", "tasks.recolor_network"),
    "inpaint": ("tasks.inpaint_network",),
}
"""Modules with further backends of a stage, where one file would hold two methods."""

Ref = tuple[str, str]
"""A value's address: (key of the artifact that holds it, output name); a root image is (its sha256, "image")."""


class UsageError(Exception):
    """The user asked for something that does not exist or does not fit: one sentence with the remedy."""


@dataclass(frozen=True)
class Image:
    """A root input: a picture and which of its faces is meant (0 = largest)."""

    path: str
    sha256: str
    face_index: int = 0
    pixels: int = 0  # width x height, for bounding memory
    reading: str = ""  # how it is decoded, where an earlier version did so otherwise: see `tasks.frame.Header.reading`


_ROOTS = ("image", "face_index")


@dataclass(frozen=True)
class Item:
    """What the final node makes one output of: pictures by role."""

    id: str
    images: Mapping[str, Image]
    given: Mapping[Ref, str] = field(default_factory=dict)  # (node, role or "") whose outputs are known without it -> what decides them


@dataclass(frozen=True)
class Node:
    """One stage at one place of the graph.

    A wire names where an input comes from: `image` and `face_index` (the picture itself), `align.face` (another node's output), for nodes
    of a pair also with the role in front (`source.align.face`). Several names with `|` between are alternatives: the first counts whose
    producer's backend writes it. A backend takes the wires that it reads. A node is called as its stage, or so with something behind it
    (`encode_driven`).
    """

    name: str
    stage: str
    of: Literal["image", "pair"]
    wires: Mapping[str, str]
    checkpoint: bool = False  # kept under retention `resume`: dear to compute for its size


@dataclass(frozen=True)
class Work:
    """One node on one item: the key of what it makes and the values it reads."""

    node: str
    key: str
    reads: Mapping[str, Ref]
    constants: Mapping[str, Any]  # inputs that are plain values


@dataclass(frozen=True)
class Settings:
    """What decides bytes beside the inputs: a backend per stage, changed config fields, the device kind, the instruction set."""

    backends: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]]  # by stage, for all its nodes, or by node, for that one
    device: str = "cpu"
    instructions: str = ""  # of the processor; "": those that the store was begun with, see `Store.begun_with`


def backends(stage: str) -> Mapping[str, Stage]:
    """All backends of a stage, the default first. Raises UsageError for an unknown stage."""
    if stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}{near_miss(stage, STAGES)}; stages are {', '.join(STAGES)}")
    modules = [importlib.import_module(name) for name in (f"tasks.{stage}", *MORE_BACKENDS.get(stage, ()))]
    return {name: backend for module in modules for name, backend in module.BACKENDS.items()}


def pick_backend(stage: str, name: str | None) -> Stage:
    """A stage's backend by name (None: the default). Raises UsageError that lists the choices.

    A name such as `your_package.your_module:NAME` is looked up in the mapping `BACKENDS` of that module: a backend of your own.
    """
    if name and ":" in name:
        return _outside_backend(stage, name)
    choices = backends(stage)
    if name is None:
        return next(iter(choices.values()))
    if name not in choices:
        raise UsageError(f"stage {stage} has no backend {name!r}{near_miss(name, choices)}; choose one of {', '.join(choices)}")
    return choices[name]


def _outside_backend(stage: str, name: str) -> Stage:
    module, _, _ = name.partition(":")
    try:
        choices: Mapping[str, Stage] = importlib.import_module(module).BACKENDS
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"stage {stage}: the module of backend {name!r} cannot be used: {error}") from None
    found = choices.get(name)
    if not found or (found.name, found.backend) != (stage, name):
        fitting = [key for key, backend in choices.items() if backend.name == stage]
        has_none = f"{module}.BACKENDS has no backend {name!r} of it{near_miss(name, fitting)}"
        raise UsageError(f"stage {stage}: {has_none}; it has {', '.join(fitting) or 'none'}")
    return found


def make_config(stage: Stage, options: Mapping[str, Any]) -> Any:
    """The stage's config with some fields changed; values are checked against the type of the default. Raises UsageError."""
    return configured(stage.config, options, stage.name, f"stage {stage.name} ({stage.backend})")


def configured(config: type, options: Mapping[str, Any], name: str, owner: str) -> Any:
    """A config with some fields changed, as `make_config`; `name` stands before a setting's own, `owner` says whose they are."""
    known = {field.name: field for field in fields(config)}
    default = config()
    changed: dict[str, Any] = {}
    for setting, value in options.items():
        if setting not in known:
            raise UsageError(f"{owner} has no setting {setting!r}{near_miss(setting, known)}; it has {', '.join(known) or 'none'}")
        want = type(getattr(default, setting))
        if want is float and type(value) is int:
            value = float(value)
        if want is tuple and isinstance(value, list):
            value = tuple(value)
        if not _fits(value, getattr(default, setting)):
            shown = f"like {list(getattr(default, setting))!r}" if want is tuple else want.__name__
            raise UsageError(f"{name}.{setting} must be {shown}, got {value!r}")
        changed[setting] = value
    try:
        return config(**changed)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _fits(value: Any, default: Any) -> bool:
    """Whether a value may stand for the default: same type, finite; a tuple of numbers keeps its length, one of names need not."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        same_length = len(value) == len(default) or all(isinstance(item, str) for item in default)
        return same_length and all(_fits(item, default[0]) for item in value)
    if isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value)
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


class Graph:
    """Nodes with the stages and configs that serve them; makes keys and lists of work."""

    def __init__(
        self,
        nodes: Iterable[Node],
        final: Ref,
        settings: Settings,
        prints: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        wanted: Collection[Ref] = (),
        extra: Mapping[str, Stage] | None = None,
    ) -> None:
        """`prints`: fingerprints of an earlier run, which keep their keys where backend and config are the same.

        `wanted`: all (node, role or "") whose results are made for their own sake, where there are others than `final`; none of them waits
        for another. `extra`: stages by name that are no part of the pipeline.
        """
        self._earlier = prints or {}
        self.wanted = frozenset(wanted) or frozenset({(final[0], "")})
        self.all_nodes = {node.name: node for node in nodes}
        self.final = final  # (node, output)
        self.settings = settings
        for name in (*settings.backends, *(name for name in settings.options if name not in self.all_nodes)):
            backends(name)  # a name that no stage bears is an error, not a setting without effect
        more = extra or {}
        self.stages = {
            name: more.get(n.stage) or pick_backend(n.stage, settings.backends.get(n.stage)) for name, n in self.all_nodes.items()
        }
        self.configs = {
            name: make_config(stage, {**settings.options.get(stage.name, {}), **settings.options.get(name, {})})
            for name, stage in self.stages.items()
        }
        self.nodes = [node for node in self.all_nodes.values() if node.name in self._reachable()]

    def _reachable(self) -> set[str]:
        reached, left = set(), [name for name, _ in self.wanted]
        while left:
            name = left.pop()
            if name not in reached:
                reached.add(name)
                for producer, output in self._inputs(name):
                    self._check_written(name, producer, output)
                    left.append(producer)
        return reached

    def producers(self, node: str) -> set[str]:
        """The nodes whose outputs this one reads."""
        return {producer for producer, _ in self._inputs(node)}

    def _inputs(self, node: str) -> Iterator[tuple[str, str]]:
        """(producer, output) of everything that a node's backend reads of other nodes."""
        for read in self.reads(node):
            *path, output = self.wire(self.all_nodes[node], read).split(".")
            if output not in _ROOTS:
                yield path[-1], output

    def reads(self, name: str) -> tuple[str, ...]:
        """Inputs that a node takes with the chosen backends: all that its own declares, and of the optional ones those that are written."""
        stage, wires = self.stages[name], self.all_nodes[name].wires
        optional = [read for read in stage.optional if read in wires]
        return (*stage.reads, *(read for read in optional if self._is_written(self.wire(self.all_nodes[name], read))))

    def wire(self, node: Node, read: str) -> str:
        """Return where a node's input comes from with the chosen backends. Raises UsageError if the node is not given it."""
        if read not in node.wires:
            raise UsageError(
                f"stage {node.stage}, backend {self.stages[node.name].backend}, reads {read!r}, which {node.name} is not given"
            )
        *alternatives, last = node.wires[read].split("|")
        return next((wire for wire in alternatives if self._is_written(wire)), last)

    def _is_written(self, wire: str) -> bool:
        """Return whether the producer that a wire names writes the output that it names."""
        *path, output = wire.split(".")
        return output in _ROOTS or output in self.stages[path[-1]].writes

    def _check_written(self, reader: str, producer: str, output: str) -> None:
        reads, writes = self.stages[reader], self.stages[producer]
        if output not in writes.writes:
            fitting = [name for name, stage in backends(writes.name).items() if output in stage.writes]
            raise UsageError(
                f"{reads.name}={reads.backend} reads {output!r} of {producer}, which {writes.name}={writes.backend} does not write; "
                f"add --stage {writes.name}={' or '.join(fitting)}, or choose another backend of {reads.name}"
            )

    def device(self, node: str) -> str:
        """cpu or cuda: where the node's stage runs."""
        return self.settings.device if self.stages[node].device == "any" else "cpu"

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What decides each node's bytes beside its inputs, as plain data."""
        return {node.name: self._fingerprint(node.name) for node in self.nodes}

    def _fingerprint(self, name: str) -> dict[str, Any]:
        stage, config = self.stages[name], self.configs[name]
        earlier = self._earlier.get(name)
        if earlier and earlier["backend"] == stage.backend and _same(stage, earlier["config"], config):
            return dict(earlier)
        return {
            "stage": stage.name,
            "backend": stage.backend,
            "version": stage.version,
            "config": asdict(config),
            "weights": {weight: weight_digest(weight) for weight in stage.weights(config)},
            "libraries": {library: library_version(library, f"stage {stage.name}, backend {stage.backend}") for library in stage.libraries},
            "device": self.device(name),
            "precision": "float32",
            **self.instructions(name),
        }

    def instructions(self, node: str) -> dict[str, str]:
        """What a node's fingerprint says of the instruction set: nothing for one that a GPU computes, or where it is the store's own."""
        return {"instructions": self.settings.instructions} if self.settings.instructions and self.device(node) == "cpu" else {}

    @cached_property
    def _prints(self) -> dict[str, str]:
        return {name: digest(found) for name, found in self.fingerprints.items()}

    def weights(self) -> list[str]:
        """Names of all weights that the graph's stages need."""
        return sorted({weight for found in self.fingerprints.values() for weight in found["weights"]})

    def works(self, item: Item) -> dict[Ref, Work]:
        """All work one item may need, producers first, by (node, role or "")."""
        made: dict[Ref, Work] = {}
        for node in self.nodes:
            for role in item.images if node.of == "image" else ("",):
                made[node.name, role] = self._work(node, role, item, made)
        return made

    def _work(self, node: Node, role: str, item: Item, made: Mapping[Ref, Work]) -> Work:
        reads: dict[str, Ref] = {}
        constants: dict[str, Any] = {}
        readings: dict[str, str] = {}
        if (node.name, role) in item.given:
            return Work(node.name, digest(["given", self._prints[node.name], item.given[node.name, role]]), reads, constants)
        image = item.images[role] if role else None
        for read in self.reads(node.name):
            *path, output = self.wire(node, read).split(".")
            of = item.images[role or path.pop(0)] if output == "image" else image
            if output == "face_index" and of:
                constants[read] = of.face_index
            elif output == "image" and of:
                reads[read] = (of.sha256, "image")
                readings |= {read: of.reading} if of.reading else {}
            else:
                producer = path[-1]
                side = role or (path[0] if len(path) == 2 else "")
                reads[read] = (made[producer, side].key, output)
        key = digest([self._prints[node.name], {**reads, **constants}, *([readings] if readings else [])])
        return Work(node.name, key, reads, constants)


def _same(stage: Stage, earlier: Mapping[str, Any], config: Any) -> bool:
    """Whether a stored config is this one; a setting that came later had its default then."""
    try:
        return canonical(asdict(make_config(stage, earlier))) == canonical(asdict(config))
    except UsageError:
        return False


def needed(works: Mapping[str, Work], finals: Collection[str], have: Collection[str]) -> list[Work]:
    """Work that must be done so that `finals` exist, producers first, given the keys that exist already."""
    wanted: set[str] = set()
    left = [key for key in finals if key not in have]
    while left:
        key = left.pop()
        if key not in wanted:
            wanted.add(key)
            left += [producer for producer, output in works[key].reads.values() if output != "image" and producer not in have]
    return [work for key, work in works.items() if key in wanted]


def library_version(distribution: str, user: str = "this command") -> str:
    """The installed version of a package. Raises UsageError if `user`, which needs it, has to do without."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        needs = f"{user} needs the package {distribution}"
        raise UsageError(f"{needs}, which is not installed; see the extras in pyproject.toml and `e4s doctor`") from None
