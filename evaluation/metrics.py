"""The metrics: one declared entry each, from cached features to values per pair to a number with its interval.

A new metric is one file with its formula and one entry in `METRICS`. Nothing here reads files or runs a network: the flow hands over what
the feature networks (`evaluation.features`) and the picture comparison (`evaluation.preservation.compare`) made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape
from evaluation.bootstrap import interval_or_reason
from evaluation.colour import DEVIATIONS, FAULTY, LEAST_DEVIATION, TAIL
from evaluation.expression import EYES, MOUTH, expression_distance, part_distance
from evaluation.features import Kind
from evaluation.fid import fid
from evaluation.pose import pose_distance
from evaluation.retrieval import cosines, hits, ranks

Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Read = Literal["source", "target", "swapped", "truth", "original", "reconstruction", "outside", "skin", "answer", "reconstructed"]
"""What a metric reads: features of a picture (of a pair: source, target, swapped, and truth where the manifest names the picture that the
result should equal; of an inversion: original, reconstruction), or the comparison of two (`outside`: swapped and target outside the face;
`skin`: their skin; `answer`: swapped and truth inside the face; `reconstructed`: reconstruction and original), columns as `COMPARED`."""

COMPARED: Final[Mapping[Kind, tuple[str, ...]]] = {
    "pixels": ("ssim", "psnr", "rmse"),
    "lpips": ("lpips",),
    "skin": ("outliers",),
    "answer": ("ssim", "psnr", "rmse"),
    "answer_lpips": ("lpips",),
}
"""Columns of a comparison of two pictures, by the kind of what compares them."""

OF_SET: Final = "a number of the whole set"  # why it has no interval


class Unmeasurable(ValueError):
    """The pairs at hand cannot give this number; the sentence says why."""


@dataclass(frozen=True, kw_only=True)
class PairData:
    """What one network made of all pairs, a row each."""

    features: Mapping[Read, npt.NDArray[Any]]  # (N, D) each
    source_ids: Sequence[str] = ()  # (N,): the source picture's identity, for retrieval; several pairs may share one
    failures: Mapping[Read, Mapping[int, str]] = field(default_factory=dict)  # rows without features, and why

    def __post_init__(self) -> None:
        counts = {name: len(rows) for name, rows in self.features.items()}
        if len({*counts.values(), *([len(self.source_ids)] if self.source_ids else [])}) > 1:
            raise ValueError(f"expected the same number of rows everywhere, got {counts} and {len(self.source_ids)} source ids")

    def __len__(self) -> int:
        return max((len(rows) for rows in self.features.values()), default=0)

    def failed(self, reads: Sequence[Read]) -> dict[int, str]:
        """Rows that lack something of `reads`, and the first reason."""
        rows: dict[int, str] = {}
        for name in reads:
            for row, reason in self.failures.get(name, {}).items():
                rows.setdefault(row, reason)
        return rows


PerPair = Callable[[PairData, Mask], Float64]
"""All pairs and which of them count (N,) bool -> a value for each that counts."""
OfSet = Callable[[PairData, Mask], float]
"""The same -> one number, where pairs have none of their own."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, as data."""

    name: str
    title: str
    kind: Kind  # of the networks that serve it
    reads: tuple[Read, ...]
    unit: str
    better: Literal["higher", "lower"]
    formula: str
    per_pair: PerPair | None = None  # the number is the mean of these
    of_set: OfSet | None = None
    networks: tuple[str, ...] = ()  # the only ones of its kind that can serve it; (): all


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number with what is needed to judge it, or the reason why there is none."""

    metric: str
    protocol: str
    network: str
    sha256: str  # of the network's weights; "" if nothing is learnt
    value: float | None
    low: float | None  # of the interval
    high: float | None
    count: int  # of the pairs that are in the number
    failed: Mapping[str, int]  # reason -> pairs left out
    reason: str = ""  # why there is no value, or no interval


@dataclass(frozen=True)
class Outcome:
    """What `measure` returns: the number, and the value of each pair (N,), NaN where it has none."""

    measured: Measured
    values: Float64


def measure(metric: Metric, data: PairData, *, protocol: str = "", network: str = "", sha256: str = "") -> Outcome:
    """Compute one metric over all pairs; pairs that failed are left out and counted.

    Never NaN: on an empty, single or all-failed set the result says so. Raises ValueError when a feature that did not fail is not finite.
    """
    missing = [name for name in metric.reads if name not in data.features]
    if missing:
        raise ValueError(f"{metric.name} reads {', '.join(missing)}, which is not given")
    failed = data.failed(metric.reads)
    counted = np.ones(len(data), bool)
    counted[list(failed)] = False
    _check_finite(metric, data, counted)
    values = np.full(len(data), np.nan)
    number, interval, reason = None, None, ""
    if not counted.any():
        reason = f"all {len(data)} pairs failed" if len(data) else "no pairs"
    else:
        try:
            if metric.per_pair is not None:
                values[counted] = metric.per_pair(data, counted)
                number = float(values[counted].mean())
                interval, reason = interval_or_reason(values[counted])
            elif metric.of_set is not None:
                number, reason = metric.of_set(data, counted), OF_SET
        except Unmeasurable as error:
            reason = str(error)
    low, high = interval or (None, None)
    measured = Measured(
        metric=metric.name,
        protocol=protocol,
        network=network,
        sha256=sha256,
        value=number,
        low=low,
        high=high,
        count=int(counted.sum()),
        failed=dict(Counter(failed.values()).most_common()),
        reason=reason,
    )
    return Outcome(measured, values)


def _check_finite(metric: Metric, data: PairData, counted: Mask) -> None:
    for name in metric.reads:
        wrong = counted & ~np.isfinite(data.features[name]).all(axis=1)
        if wrong.any():
            raise ValueError(f"{metric.name}: {int(wrong.sum())} rows of {name} are not finite and not marked as failed")


def _between(a: Read, b: Read, distance: Callable[[npt.NDArray[Any], npt.NDArray[Any]], Float64]) -> PerPair:
    return lambda data, counted: distance(data.features[a][counted], data.features[b][counted])


def _column(name: Read, kind: Kind, column: str) -> PerPair:
    index = COMPARED[kind].index(column)
    return lambda data, counted: np.asarray(data.features[name][counted, index], np.float64)


def _source_ranks(data: PairData, counted: Mask) -> Float64:
    """Ranks of the own sources among all distinct sources that have features, also those of pairs whose result failed."""
    if len(data.source_ids) != len(data):
        raise ValueError(f"retrieval needs a source id for each of the {len(data)} pairs, got {len(data.source_ids)}")
    present = [row for row in range(len(data)) if row not in data.failures.get("source", {})]
    first: dict[str, int] = {}
    for row in present:
        first.setdefault(data.source_ids[row], row)
    if len(first) < 2:
        raise Unmeasurable(f"retrieval needs a gallery of at least 2 sources, got {len(first)}")
    place = {source: index for index, source in enumerate(first)}
    own = np.array([place[data.source_ids[row]] for row in np.flatnonzero(counted).tolist()])
    return ranks(data.features["swapped"][counted], data.features["source"][list(first.values())], own)


def _fid(a: Read, b: Read) -> OfSet:
    def of_set(data: PairData, counted: Mask) -> float:
        if counted.sum() < 2:
            raise Unmeasurable("FID needs at least 2 pictures, got 1")
        check_shape(data.features[a], "N D")
        return fid(data.features[a][counted], data.features[b][counted])

    return of_set


def _part(part: Sequence[int]) -> PerPair:
    return _between("swapped", "target", lambda a, b: part_distance(part, a, b))


def _is_faulty(data: PairData, counted: Mask) -> Float64:
    return np.asarray(data.features["skin"][counted, COMPARED["skin"].index("outliers")] > FAULTY, np.float64)


_COMPARISONS: tuple[tuple[str, str, Kind, str, Literal["higher", "lower"], str], ...] = (
    ("ssim", "SSIM", "pixels", "", "higher", "Gaussian window of sigma 1.5 px, 11 taps, data range 1, mean over channels and places"),
    ("psnr", "PSNR", "pixels", "dB", "higher", "10 log10(1 / MSE) per picture, at most 120 dB (equality); mean over pictures"),
    ("rmse", "RMSE", "pixels", "", "lower", "root of the MSE over channels and pixels per picture, in [0, 1]; mean over pictures"),
    ("lpips", "LPIPS", "lpips", "", "lower", "version 0.1, AlexNet"),
)


def _comparisons(prefix: str, read: Read, title: str, region: str, kinds: Mapping[Kind, Kind] | None = None) -> list[Metric]:
    """The picture metrics of one comparison; `kinds`: other kinds of networks that make it than `pixels` and `lpips`."""
    return [
        Metric(
            name=f"{prefix}_{name}",
            title=f"{label}, {title}",
            kind=(kinds or {}).get(kind, kind),
            reads=(read,),
            unit=unit,
            better=better,
            formula=formula + region,
            per_pair=_column(read, kind, name),
        )
        for name, label, kind, unit, better, formula in _COMPARISONS
    ]


_INSIDE = "; only pixels inside the convex hull of the true picture's 68 landmarks count"
_RANKED = "cosine of the swapped face to all distinct sources of the set; ties at mid-rank"
_OUTLIERS = (
    "skin pixels of the swapped face whose a or b (CIE Lab) lies outside the target's skin: its percentiles "
    f"{100 * TAIL:g} and {100 - 100 * TAIL:g}, widened by {DEVIATIONS:g} x 1.4826 MAD (at least {LEAST_DEVIATION:g} each)"
)

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(
                name=f"id_top{k}",
                title=f"ID retrieval, top {k}",
                kind="identity",
                reads=("swapped", "source"),
                unit="share",
                better="higher",
                formula=f"share of pairs whose source ranks among the first {k}: {_RANKED}",
                per_pair=lambda data, counted, k=k: hits(_source_ranks(data, counted), k),  # type: ignore[misc]
            )
            for k in (1, 5)
        ),
        Metric(
            name="id_cosine",
            title="ID similarity",
            kind="identity",
            reads=("swapped", "source"),
            unit="cosine",
            better="higher",
            formula="cosine of the swapped face and its source",
            per_pair=_between("swapped", "source", cosines),
        ),
        Metric(
            name="id_target_cosine",
            title="ID similarity to the target",
            kind="identity",
            reads=("swapped", "target"),
            unit="cosine",
            better="lower",
            formula="cosine of the swapped face and its target",
            per_pair=_between("swapped", "target", cosines),
        ),
        Metric(
            name="pose",
            title="Pose distance",
            kind="pose",
            reads=("swapped", "target"),
            unit="degrees",
            better="lower",
            formula="L2 distance of (yaw, pitch, roll) to the target",
            per_pair=_between("swapped", "target", pose_distance),
        ),
        Metric(
            name="expression",
            title="Expression distance",
            kind="expression",
            reads=("swapped", "target"),
            unit="",
            better="lower",
            formula="L2 distance of the expression coefficients to the target",
            per_pair=_between("swapped", "target", expression_distance),
        ),
        *(
            Metric(
                name=f"expression_{name}",
                title=f"Expression distance, {name}",
                kind="expression",
                reads=("swapped", "target"),
                unit="",
                better="lower",
                formula=f"L2 distance of the {len(part)} blendshapes of the {name} to the target",
                per_pair=_part(part),
                networks=("blendshapes",),
            )
            for name, part in (("mouth", MOUTH), ("eyes", EYES))
        ),
        Metric(
            name="skin_outliers",
            title="Skin of another colour",
            kind="skin",
            reads=("skin",),
            unit="%",
            better="lower",
            formula=_OUTLIERS,
            per_pair=lambda data, counted: 100 * _column("skin", "skin", "outliers")(data, counted),
        ),
        Metric(
            name="colour_faults",
            title="Pairs with colour outliers",
            kind="skin",
            reads=("skin",),
            unit="share",
            better="lower",
            formula=f"share of pairs with more than {FAULTY:.1%} of {_OUTLIERS}",
            per_pair=_is_faulty,
        ),
        Metric(
            name="fid",
            title="FID to the targets",
            kind="inception",
            reads=("swapped", "target"),
            unit="",
            better="lower",
            formula="Frechet distance of Gaussians fitted to the swapped faces and to their targets; biased by the number of pictures",
            of_set=_fid("swapped", "target"),
        ),
        Metric(
            name="reconstruction_fid",
            title="FID, reconstruction",
            kind="inception",
            reads=("reconstruction", "original"),
            unit="",
            better="lower",
            formula="Frechet distance of Gaussians fitted to reconstructions and originals; biased by the number of pictures",
            of_set=_fid("reconstruction", "original"),
        ),
        *_comparisons("preserved", "outside", "target outside the face", "; only pixels outside the target's inner face count"),
        *_comparisons("reconstruction", "reconstructed", "reconstruction", ""),
        *_comparisons("truth", "answer", "true picture inside the face", _INSIDE, kinds={"pixels": "answer", "lpips": "answer_lpips"}),
        Metric(
            name="truth_cosine",
            title="ID similarity to the true picture",
            kind="identity",
            reads=("swapped", "truth"),
            unit="cosine",
            better="higher",
            formula="cosine of the swapped face and the face of the true picture",
            per_pair=_between("swapped", "truth", cosines),
        ),
    )
}
