"""`e4s models check-reference`: our networks and weightless stages against vectors of the published code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
from rich.table import Table

from e4s_models.published import PUBLISHED, Array, Check, check_reference, compare
from flows.console import plain_console
from storage.spelling import near_path
from tasks.blend import multiband_blend
from tasks.graph import UsageError
from tasks.swap import recompose_mask


def check_all(folder: str) -> int:
    """Print a line per output of every case in `folder`; 0 if all agree, 1 if any does not. Raises UsageError."""
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder{near_path(path)}; give the one that holds NAME.json and NAME_case0.npz")
    table = Table("network", "case", "output", "error", "limit", "")
    failed = count = 0
    for check in _checks(path):
        count += 1
        failed += not check.passed
        table.add_row(
            check.network, check.case, check.output, f"{check.error:.2g}", f"{check.limit:.2g}", "ok" if check.passed else "FAILED"
        )
    if not count:
        raise UsageError(f"{path}: no reference vectors here (NAME.json with NAME_*.npz) for {', '.join(PUBLISHED)}, mask_swap or blend")
    plain_console(width=120).print(table)
    absent = sorted({spec.stem for spec in path.glob("*.json")} - PUBLISHED.keys())
    print(f"{count} outputs compared, {failed} failed" + (f"; not ported yet: {', '.join(absent)}" if absent else ""))
    return 1 if failed else 0


def _checks(folder: Path) -> Iterator[Check]:
    yield from check_reference(folder)
    for name, compute in (("mask_swap", _mask_swap), ("blend", _blend)):
        for path in sorted(folder.glob(f"{name}_*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                case = dict(stored)
            for output, (value, tolerance) in compute(case).items():
                if tolerance:  # grey levels
                    difference = np.abs(value.astype(int) - case[output].astype(int)).max()
                    yield Check(name, path.stem, output, float(difference), tolerance)
                else:
                    yield Check(name, path.stem, output, compare(name, path.stem, output, value, case[output]).error, 0.0)


def _mask_swap(case: Mapping[str, Array]) -> dict[str, tuple[Array, float]]:
    swapped, hole = recompose_mask(case["driven_label_u8"], case["target_label_u8"])
    return {"swapped_label_u8": (swapped, 0.0), "hole_u8": (hole, 0.0)}


def _blend(case: Mapping[str, Array]) -> dict[str, tuple[Array, float]]:
    side = case["mask_u8"].shape[::-1]
    full, other = (cv2.resize(case[f"{name}_u8_256"], side, interpolation=cv2.INTER_CUBIC) for name in ("full", "other"))
    mask = case["mask_u8"].astype(np.float32)
    blended = multiband_blend(np.asarray(full), np.asarray(other), mask / max(float(mask.max()), 1.0))
    return {"blended_sub_u8": (blended[::4, ::4], 1.0), "blended_crop_u8": (blended[400:528, 400:528], 1.0)}
