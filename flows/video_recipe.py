"""What decides the bytes of everything that is made of videos, and so the keys. The same in every process. Loads no model, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

from e4s_models.weights import weight_digest
from flows.stages import FRAME_RESULT, VIDEO_NODES
from storage.keys import digest
from storage.video_run import VideoRow
from tasks.graph import Graph, Image, Item, Ref, UsageError, library_version, needed, pick_backend
from tasks.paste import PasteConfig
from tasks.steady import reaches
from tasks.track import SmoothConfig, TrackConfig
from tasks.tune import TuningConfig
from tasks.video import ProbeConfig
from tasks.video_pass import DETECT_RANGE, ID_NETWORK, Way
from tasks.video_write import EncodeConfig

CONFIGS: Final[Mapping[str, type]] = {
    "probe": ProbeConfig,
    "track": TrackConfig,
    "smooth": SmoothConfig,
    "tuning": TuningConfig,
    "output": EncodeConfig,
}
"""Settings that are no stage's, by the name in `--set NAME.SETTING=VALUE` and in a profile."""

VERSIONS: Final = {"probe": 1, "sound": 1, "detect": 1, "track": 1, "tuning": 1, "segment": 2}
"""Raise one whenever the bytes of that artifact change for the same inputs and settings."""

_LIBRARIES: Final = ("av", "numpy", "opencv-python-headless")


@dataclass(frozen=True)
class Configs:
    """Settings that are no node's."""

    probe: ProbeConfig
    track: TrackConfig
    smooth: SmoothConfig
    tuning: TuningConfig
    output: EncodeConfig
    paste: PasteConfig


@dataclass
class Recipe:
    """What decides the bytes of everything that is made of videos, and so the keys. Worker processes have the same one."""

    graph: Graph
    configs: Configs

    @cached_property
    def prints(self) -> dict[str, Any]:
        """What decides each kind of artifact beside its inputs."""
        return _prints(self.graph, self.configs)

    def probe_key(self, row: VideoRow) -> str:
        """Of a video's frame table."""
        return digest(["probe", self.prints["probe"], row.video_sha256])

    def sound_key(self, row: VideoRow, tracks: Sequence[int]) -> str:
        """Of sound tracks that were converted. Nothing else is made of them but the output, so that few videos need to know of it."""
        made = [VERSIONS["sound"], library_version("av"), self.prints["probe"]]
        return digest(["sound", made, row.video_sha256, list(tracks)])

    def detect_key(self, row: VideoRow, start: int, stop: int) -> str:
        """Of what was found in a stretch of frames."""
        return digest(["detect", self.prints["detect"], self.prints["probe"], row.video_sha256, start, stop])

    def track_key(self, row: VideoRow, detected: Sequence[str]) -> str:
        """Of the chosen person's course, which follows from the keys of all detections."""
        return digest(["track", self.prints["track"], row.face_sha256 or int(row.face), detected])

    @cached_property
    def reach(self) -> int:
        """Frames on each side that decide what is known of a frame before it goes through the stages."""
        return max(reaches(self.graph.fingerprints, self.configs.smooth).values(), default=0)

    def tuning_key(self, row: VideoRow, track: str) -> str:
        """Of the generator's tuning along a course with this key; "" where the stage `tune` does not tune."""
        if "tuning" not in self.prints:
            return ""
        return digest(["tuning", self.prints["tuning"], self.prints["probe"], row.source_sha256, row.source_face, track])

    def segment_key(self, row: VideoRow, start: int, stop: int, way: Way, tuning: str = "") -> str:
        """Of an encoded group of pictures, frames [start, stop).

        It names all that decides the keys of the frames' own results, which are not worked out for this.
        """
        first, last = max(0, start - self.reach), min(len(way.state), stop + self.reach)
        around = [[way.course(frame), int(way.run[frame] - way.run[first])] for frame in range(first, last)]
        source = [*self.source_identity(row), *([tuning] if tuning else [])]
        return digest(["segment", self.prints["segment"], self.prints["probe"], source, row.video_sha256, start, stop, first, around])

    def item(self, row: VideoRow, frame: int, frame_id: str, given: Mapping[Ref, str]) -> Item:
        """The pair of source and one frame, of which the outputs of some nodes are known: see `Item.given`."""
        pictures = {"source": self.source(row), "target": Image(row.video, frame_id)}
        return Item(f"{row.id}:{frame}", pictures, given)

    def source(self, row: VideoRow) -> Image:
        return Image(row.source, row.source_sha256, row.source_face, reading=row.source_reading)

    @staticmethod
    def source_identity(row: VideoRow) -> list[Any]:
        """What tells a source apart in keys; how it is read only where that is another way than an earlier version's."""
        return [row.source_sha256, row.source_face, *([{"reading": row.source_reading}] if row.source_reading else [])]

    def source_graph(self) -> Graph:
        """The work on a source that does not depend on the frame, as a graph of its own with the same keys."""
        works = self.graph.works(Item("", {"source": Image("", "0" * 64), "target": Image("", "1" * 64)}))
        by_key = {work.key: work for work in works.values()}
        used = {work.key for work in needed(by_key, [works[FRAME_RESULT[0], ""].key], ())}
        wanted = [place for place, work in works.items() if place[1] == "source" and work.key in used]
        if not wanted:
            chosen = " and ".join(f"{name}={self.graph.stages[name].backend}" for name in ("reenact", "swap") if name in self.graph.stages)
            raise UsageError(f"with {chosen} no frame needs work on the source picture, so nothing of it would be seen; choose others")
        return Graph(VIDEO_NODES, FRAME_RESULT, self.graph.settings, wanted=wanted)


def _prints(graph: Graph, configs: Configs) -> dict[str, Any]:
    def made(kind: str, *weights: str, libraries: Sequence[str] = _LIBRARIES, **more: Any) -> dict[str, Any]:
        return {
            "version": VERSIONS[kind],
            "weights": {name: weight_digest(name) for name in weights},
            "libraries": {name: library_version(name) for name in libraries},
            **({"instructions": graph.settings.instructions} if graph.settings.instructions else {}),
            **more,
        }

    landmarks, paste = "dlib_landmarks68", pick_backend("paste", graph.settings.backends.get("paste"))
    output = {name: value for name, value in asdict(configs.output).items() if name not in ("container", "sound")}
    driving = {name: graph.fingerprints[name] for name in _upstream(graph, "tune")} if "tune" in graph.fingerprints else {}
    tuning = {"tuning": made("tuning", nodes=driving, config=asdict(configs.tuning), smooth=asdict(configs.smooth))} if driving else {}
    return {
        "probe": made("probe", config=asdict(configs.probe)),
        "detect": made("detect", landmarks, libraries=(*_LIBRARIES, "dlib-bin"), range=DETECT_RANGE),
        "track": made(
            "track",
            landmarks,
            ID_NETWORK,
            libraries=(*_LIBRARIES, "dlib-bin", "torch"),
            track=asdict(configs.track),
            smooth={name: value for name, value in asdict(configs.smooth).items() if name not in ("mesh", "mask", "light")},
            min_face=graph.configs["align"].min_face,
        ),
        **tuning,
        "segment": made(
            "segment", nodes=graph.fingerprints, paste=[paste.version, asdict(configs.paste)], output=output, smooth=asdict(configs.smooth)
        ),
    }


def _upstream(graph: Graph, node: str) -> set[str]:
    """A node and all that its inputs come from."""
    return {node}.union(*(_upstream(graph, producer) for producer in graph.producers(node)))
