"""The 12 face regions and the 19-class label maps they are merged from: the only home of label numbers.

Source: `shared/reference` of the published code (BiSeNet's face-parsing order).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Region(IntEnum):
    """Region ids of a label map, (H, W) uint8."""

    BACKGROUND = 0  # with cloth, hat, necklace
    LIPS = 1
    BROWS = 2
    EYES = 3
    HAIR = 4
    NOSE = 5
    SKIN = 6
    EARS = 7
    NECK = 8
    MOUTH = 9  # interior: teeth, tongue
    GLASSES = 10
    EAR_RINGS = 11


NUM_REGIONS = len(Region)

_BISENET19_CLASSES = {
    Region.BACKGROUND: (0, 15, 16, 18),
    Region.LIPS: (12, 13),
    Region.BROWS: (2, 3),
    Region.EYES: (4, 5),
    Region.HAIR: (17,),
    Region.NOSE: (10,),
    Region.SKIN: (1,),
    Region.EARS: (7, 8),
    Region.NECK: (14,),
    Region.MOUTH: (11,),
    Region.GLASSES: (6,),
    Region.EAR_RINGS: (9,),
}

INNER_FACE = (Region.LIPS, Region.BROWS, Region.EYES, Region.NOSE, Region.SKIN, Region.MOUTH, Region.GLASSES)
"""Regions that make up the inner face: everything the swap may repaint (no hair, ears, neck)."""


def _table(classes: dict[Region, tuple[int, ...]]) -> npt.NDArray[np.uint8]:
    table = np.zeros(19, np.uint8)
    for region, labels in classes.items():
        table[list(labels)] = region
    return table


BISENET19_TO_REGIONS = _table(_BISENET19_CLASSES)
"""(19,) uint8: BiSeNet class -> region id; index it with a (H, W) map of classes."""

REGION_COLORS = np.array(
    [
        (40, 40, 40),
        (220, 60, 90),
        (110, 70, 30),
        (70, 160, 240),
        (150, 100, 200),
        (250, 200, 90),
        (240, 170, 130),
        (200, 120, 60),
        (120, 190, 120),
        (255, 255, 255),
        (30, 220, 220),
        (250, 250, 0),
    ],
    np.uint8,
)
"""(12, 3) uint8 RGB: how a label map is shown to people."""
