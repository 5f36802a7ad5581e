"""The RESULT lines with which every benchmark ends."""

from __future__ import annotations

import operator
from typing import Literal


class Results:
    """Claims of one benchmark: prints a line per claim and knows whether any fell short."""

    def __init__(self, benchmark: str) -> None:
        self._benchmark = benchmark
        self._short = 0

    def claim(self, name: str, value: float, target: float, direction: Literal["<=", ">="] = "<=") -> bool:
        """Print `RESULT benchmark.name = value (target <= x): ok` or `: short`. A NaN is short."""
        holds = bool({"<=": operator.le, ">=": operator.ge}[direction](value, target))
        self._short += not holds
        print(f"RESULT {self._benchmark}.{name} = {value:.4g} (target {direction} {target:g}): {'ok' if holds else 'short'}", flush=True)
        return holds

    def exit_code(self) -> int:
        """0, or 1 when any claim fell short."""
        return int(self._short > 0)
