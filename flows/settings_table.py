"""Every stage, backend and setting with its default and what it means, read from the settings' own classes."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from tasks.graph import STAGES, backends


@dataclass(frozen=True)
class Setting:
    """One setting of one backend."""

    stage: str
    backend: str
    name: str
    default: Any
    meaning: str
    """With the unit; "" where its class says nothing."""


def list_settings(stage: str) -> Iterator[Setting]:
    """Yield the settings of a stage's backends, the default backend first. A backend without settings has one of the name ""."""
    if stage in (own := video_settings()):
        yield from _of_class(stage, "", own[stage])
        return
    for name, found in backends(stage).items():
        yield from _of_class(stage, name, found.config)


def _of_class(stage: str, backend: str, config: type) -> Iterator[Setting]:
    described = fields(config) if is_dataclass(config) else ()
    if not described:
        yield Setting(stage, backend, "", None, "")
        return
    meanings, defaults = read_comments(config), config()
    for field in described:
        yield Setting(stage, backend, field.name, getattr(defaults, field.name), meanings.get(field.name, ""))


def stage_names() -> tuple[str, ...]:
    """Return the names of all stages in the order of a swap, then of what videos have besides."""
    return (*STAGES, *video_settings())


@functools.cache
def video_settings() -> dict[str, type]:
    """Return the classes of the settings of videos that belong to no stage, by the name before the dot."""
    from flows.video_recipe import Configs

    return {name: config for name, config in get_type_hints(Configs).items() if name not in STAGES}


def read_comments(config: type) -> dict[str, str]:
    """Return the comment, or the string below, of each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]
        comments = {token.start[0]: token.string.lstrip("# ") for token in tokens}
        above = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.line.lstrip().startswith("#")}
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            text = comments.get(statement.end_lineno or 0, above.get(statement.lineno - 1, ""))
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                text = " ".join(following.value.value.split())
            found[statement.target.id] = text
    return found
