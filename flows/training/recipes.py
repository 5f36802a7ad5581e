"""The small networks that `e4s train NAME` trains: an entry here, a recipe in a file of its own. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.training.loop import Recipe


@dataclass(frozen=True)
class Entry:
    """Where a recipe is, and what `e4s train --help` says of it."""

    module: str
    recipe: str  # class of the module
    version: int  # raised when checkpoints of before cannot be gone on from
    help: str


RECIPES = {
    "visibility": Entry("flows.training.visibility", "VisibilityRecipe", 1, "what is in front of a face (docs/visibility.md)"),
    "recolor": Entry(
        "flows.training.recolor", "RecolorRecipe", 1, "the target's colours and light on the swapped face (no stage uses it yet)"
    ),
    "inpaint": Entry("flows.training.inpaint", "InpaintRecipe", 1, "what lies beside a narrower face (no stage uses it yet)"),
}


def load_recipe(name: str) -> Recipe:
    """The recipe of that name."""
    entry = RECIPES[name]
    recipe: Recipe = getattr(import_module(entry.module), entry.recipe)()
    return recipe
