"""Evaluations made of numbers, for tests of pages and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaluation.bootstrap import interval_or_reason
from evaluation.metrics import METRICS, Measured
from evaluation.results import Evaluation, MetricLine


def line(
    metric: str,
    values: Sequence[float | None],
    network: str = "net",
    protocol: str = "open",
    sha256: str = "ab" * 32,
    whole: float | None = None,
) -> MetricLine:
    """A line with these values per pair; `whole`: a number of the set instead."""
    found = np.array([np.nan if value is None else value for value in values], np.float64)
    known = found[np.isfinite(found)]
    interval, reason = interval_or_reason(known) if len(known) else (None, "no pairs")
    mean = float(known.mean()) if len(known) else None
    if whole is not None:
        mean, interval, reason, found = whole, None, "a number of the whole set", np.full(len(found), np.nan)
    measured = Measured(
        metric=metric,
        protocol=protocol,
        network=network,
        sha256=sha256,
        value=mean,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        count=len(known),
        failed={},
        reason=reason,
    )
    declared = METRICS[metric]
    state = {"protocol": protocol, "metric": metric, "network": network, "sha256": sha256, "crop": "a crop", "resolution": "224 px"}
    state |= {"formula": declared.formula, "interval": "an interval"}
    return MetricLine(measured=measured, title=declared.title, unit=declared.unit, better=declared.better, state=state, values=found)


def evaluation(lines: Sequence[MetricLine], pairs: Sequence[str], run: str = "bench") -> Evaluation:
    """An evaluation of finished pairs."""
    count = len(pairs)
    return Evaluation(run=run, pairs=pairs, total=count, done=count, failed=0, left=0, lines=lines, unavailable=[], computed={}, no_face={})


def restated(found: MetricLine, **state: str) -> MetricLine:
    """The line as if it had been taken another way."""
    return replace(found, state={**found.state, **state})
