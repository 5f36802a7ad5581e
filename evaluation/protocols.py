"""Protocols: under which networks and conditions the metrics are taken. A number is only as good as the protocol it names.

A new protocol is one entry in `PROTOCOLS`. What the paper reports is in `quoted.toml`: quoted, never measured here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from evaluation.bootstrap import LEVEL, MIN_SAMPLE, RESAMPLES, SEED
from evaluation.features import NETWORKS, FeatureNetwork, Kind
from evaluation.metrics import METRICS, Metric

INTERVAL = (
    f"{LEVEL:.0%} percentile bootstrap of the mean over pairs, {RESAMPLES} resamples, PCG64 seed {SEED}; "
    f"none for fewer than {MIN_SAMPLE} pairs or equal values"
)


@dataclass(frozen=True)
class Line:
    """One row of a table: a metric as one network measures it."""

    protocol: str
    metric: Metric
    network: FeatureNetwork

    def state(self) -> dict[str, str]:
        """What is written beside the number: network, sha256, crop, resolution, formula, interval."""
        return {
            "protocol": self.protocol,
            "metric": self.metric.name,
            "network": self.network.name,
            "sha256": self.network.sha256,
            "crop": self.network.crop,
            "resolution": self.network.resolution,
            "formula": self.metric.formula,
            "interval": INTERVAL if self.metric.per_pair else "none",
        }


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One protocol, as data."""

    name: str
    source: str
    sample: str
    networks: Mapping[Kind, tuple[str, ...]]  # keys of `evaluation.features.NETWORKS`
    side: int = 1024  # px of the FFHQ-aligned crops that everything is computed from

    def __post_init__(self) -> None:
        for kind, names in self.networks.items():
            for name in names:
                if name not in NETWORKS or NETWORKS[name].kind != kind:
                    raise ValueError(f"protocol {self.name}: {name!r} is no network of kind {kind}")

    def weights(self) -> tuple[str, ...]:
        """Names in the registry of all weights that its networks need."""
        used = [NETWORKS[name] for names in self.networks.values() for name in names]
        return tuple(network.weight for network in used if network.weight)

    def lines(self) -> Iterator[Line]:
        """Every metric of `METRICS` with every network that this protocol asks for and that can serve it."""
        for metric in METRICS.values():
            for name in self.networks.get(metric.kind, ()):
                if metric.networks and name not in metric.networks:
                    continue
                yield Line(self.name, metric, NETWORKS[name])


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="open",
            source="this project: networks that package indexes give",
            sample="all pairs of the run that have an output; pairs without a detectable face in it are left out and counted",
            networks={
                "identity": ("sface", "dlib_face_id", "arcface_mbf"),
                "pose": ("6drepnet360",),
                "expression": ("blendshapes",),
                "inception": ("inception_fid_helper",),
                "pixels": ("pixels",),
                "lpips": ("lpips_alexnet",),
                "skin": ("skin_chroma",),
                "answer": ("pixels_in_face",),
                "answer_lpips": ("lpips_alexnet_in_face",),
            },
        ),
        Protocol(
            name="paper",
            source="arXiv 2310.15081, sections 6.2 and 7.2; checkpoints and crops are not stated there",
            sample="500 random pairs of the test set of CelebAMask-HQ",
            networks={
                "identity": ("cosface",),
                "pose": ("hopenet",),
                "expression": ("deep3d",),
                "inception": ("inception_standard",),
                "pixels": ("pixels",),
            },
        ),
    )
}


@dataclass(frozen=True)
class Quoted:
    """One row of a table of the paper, quoted."""

    table: str
    title: str  # the table's caption, shortened
    protocol: str
    method: str
    values: Mapping[str, float]  # name in METRICS -> number as printed


def load_quoted() -> list[Quoted]:
    """The rows of the paper's Tables 1, 2 and 3, in the paper's order. They are shown beside measured ones, marked as quoted."""
    tables = tomllib.loads(files("evaluation").joinpath("quoted.toml").read_text("utf-8"))["table"]
    return [
        Quoted(table["name"], table["title"], table["protocol"], row[0], dict(zip(table["metrics"], row[1:], strict=True)))
        for table in tables
        for row in table["rows"]
    ]
