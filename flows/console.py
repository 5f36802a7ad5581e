"""Rich consoles that print text as it is: paths, names and reasons come from the user's data and may look like markup."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.progress import TextColumn

plain_console = partial(Console, markup=False, emoji=False, highlight=False)
"""A console without markup, emoji names and colours of its own, also in cells of tables."""

PlainColumn = partial(TextColumn, markup=False)
"""A column of text in a progress bar, likewise."""
