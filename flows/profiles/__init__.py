"""Profiles: which backend serves each stage, with which settings."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from storage.spelling import near_miss, near_path
from tasks.graph import STAGES, Graph, Settings, UsageError, pick_backend


def profile_names() -> list[str]:
    return sorted(p.name.removesuffix(".toml") for p in files(__name__).iterdir() if p.name.endswith(".toml"))


def read_profile(name: str) -> Mapping[str, Mapping[str, Any]]:
    """Tables of a shipped profile, or of a .toml file given by path. Raises UsageError."""
    try:
        text = Path(name).read_text("utf-8") if name.endswith(".toml") else (files(__name__) / f"{name}.toml").read_text("utf-8")
        return tomllib.loads(text)
    except (OSError, UnicodeDecodeError):
        alike = near_path(name) if name.endswith(".toml") else near_miss(name, profile_names())
        known = f"profiles are {', '.join(profile_names())}, or give the path of a .toml file"
        raise UsageError(f"unknown profile {name!r}{alike}; {known}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"profile {name}: {error}") from None


def make_settings(profile: str, stages: Sequence[str] = (), changes: Sequence[str] = (), device: str = "cpu") -> Settings:
    """Profile + `--stage swap=codes` + `--set swap.target_layers=4` -> settings. Raises UsageError."""
    backends: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {}
    for stage, table in read_profile(profile).items():
        if not isinstance(table, dict):
            raise UsageError(f"profile {profile}: {stage} must be a table such as [{stage}]")
        options[stage] = {name: value for name, value in table.items() if name != "backend"}
        if "backend" in table:
            backends[stage] = table["backend"]  # of a stage; Graph refuses that of a node
    return change_settings(Settings(backends, options, device), stages, changes)


def change_settings(settings: Settings, stages: Iterable[str], changes: Iterable[str]) -> Settings:
    """Apply `--stage` and `--set` texts; what is set for a stage holds for all its nodes. Raises UsageError."""
    backends = dict(settings.backends)
    options = {stage: dict(table) for stage, table in settings.options.items()}
    for text in stages:
        stage, _, backend = text.partition("=")
        if not backend:
            raise UsageError(f"--stage {text!r} must read stage=backend, such as swap=codes")
        if (backends.get(stage) or pick_backend(stage, None).backend) != backend:
            for name in _tables(options, stage):
                options.pop(name)  # the profile's settings belong to the backend that it names
        backends[stage] = backend
    for text in changes:
        name, _, value = text.partition("=")
        stage, _, setting = name.partition(".")
        if not setting or not value:
            raise UsageError(f"--set {text!r} must read stage.setting=value, such as blend.levels=6")
        options.setdefault(stage, {})
        for table in _tables(options, stage):
            options[table][setting] = _toml_value(value)
    return replace(settings, backends=backends, options=options)


def check_effect(
    graph: Graph, stages: Iterable[str], changes: Iterable[str], *, used: Collection[str] = (), elsewhere: Collection[str] = ()
) -> None:
    """Refuse `--stage` and `--set` texts about stages that `graph` does not run: nobody asks for no effect. A profile may set them.

    A backend that writes nothing, such as tune=none, may be chosen: that it does not run is its effect. `used`: stages that run outside
    the graph; `elsewhere`: nodes of other graphs. Raises UsageError.
    """
    running = {*used, *(name for node in graph.nodes for name in (node.name, node.stage))}
    idle = {*STAGES, *graph.all_nodes, *elsewhere} - running
    for option, text in [*(("--stage", text) for text in stages), *(("--set", text) for text in changes)]:
        name = text.partition("=")[0].partition(".")[0]
        if name not in idle or (option == "--stage" and name in graph.stages and not graph.stages[name].writes):
            continue
        runs = ", ".join(dict.fromkeys(node.stage for node in graph.nodes))
        raise UsageError(f"{option} {text} has no effect here, since {name} does not run; what runs is {runs}")


def _tables(options: Mapping[str, Any], stage: str) -> list[str]:
    """Tables of a stage and of its nodes (`encode`, `encode_driven`), or of a node alone."""
    return [name for name in options if name == stage or name.startswith(f"{stage}_")]


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
