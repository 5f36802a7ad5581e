"""Near misses: the one place that looks for the word or the file that was probably meant."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known word that looks most like `word`, upper and lower case being one; "" if none does.

    `cutoff`: the least likeness, of 0 to 1, as `difflib` measures it.
    """
    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.casefold(), name)
    found = get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else ""


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the known word nearest to `word`, or "": what stands behind a refused word in a sentence."""
    found = nearest(word, known)
    return f" (did you mean {found}?)" if found else ""


def near_path(path: str | Path) -> str:
    """Return ` (did you mean PATH?)` for a path whose first missing part looks like a name that is there, or ""."""
    missing = Path(path)
    rest: list[str] = []
    while not missing.parent.exists() and missing != missing.parent:
        rest.insert(0, missing.name)
        missing = missing.parent
    try:
        names = os.listdir(missing.parent)  # noqa: PTH208 (names alone)
    except OSError:
        return ""
    found = nearest(missing.name, (name for name in names if not name.startswith(".")))
    if not found:
        return ""
    whole = missing.with_name(found).joinpath(*rest)
    return f" (did you mean {whole if whole.exists() else missing.with_name(found)}?)"
