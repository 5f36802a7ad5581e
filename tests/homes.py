"""A folder of downloads for a test that adds to it."""

from __future__ import annotations

from pathlib import Path

from e4s_models.weights import home


def home_with_pulled_weights(path: Path) -> Path:
    """A new E4S_HOME that has what was pulled on this machine, and no network that a user added."""
    (path / "weights").mkdir(parents=True)
    for pulled in (home() / "weights").glob("*"):
        if pulled.name not in ("published", "user"):
            (path / "weights" / pulled.name).symlink_to(pulled)
    return path
