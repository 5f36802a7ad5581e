"""Why a run of videos computes what it computes: the plan against the run before and the store, pass by pass. Decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from flows.video_plan import VideoPlan, VideoRequest, make_video_plan
from flows.video_survey import VideoKeys, VideoLookup
from flows.why import AGAIN, NEW, UNFINISHED, Reason, computed_again, nodes_above, part_changes, print_reasons, request_again, stage_changes
from storage.video_run import VideoRow, VideoRunFolder
from tasks.graph import Work
from tasks.video_write import EncodeConfig

_READS: Final = {
    "probe": ("video",),
    "detect": ("video",),
    "track": ("video", "person"),
    "tuning": ("source", "video", "person"),
    "segment": ("source", "video", "person"),
    "join": ("source", "video", "person"),
}
"""Pass -> the inputs of a row that decide what it makes."""

_ABOVE: Final = {
    "probe": (),
    "detect": ("probe",),
    "track": ("probe", "detect"),
    "tuning": ("probe", "detect", "track"),
    "segment": ("probe", "detect", "track", "tuning"),
    "join": ("probe", "detect", "track", "tuning", "segment"),
}
"""Pass -> the passes whose results it reads, and those that these read."""


def explain_videos(plan: VideoPlan) -> list[Reason]:
    """What the plan's videos left need, by pass in the order in which a video goes through them, and why.

    `detect` counts stretches of frames, `segment` groups of pictures, the others are one per video; work on a source, which videos may
    share, is named by its stage. Where the number follows from a pass that is to be made first, it is open (`Reason.more`).
    """
    return _Explained(plan).reasons()


def video_headline(plan: VideoPlan) -> str:
    """One line if videos that were done are computed again: how many, where it begins and why; else ""."""
    again = sum((before := plan.before.get(video)) is not None and before.status == "done" for video in plan.todo)
    reasons = explain_videos(plan) if again else []
    return computed_again(again, "video", reasons) if reasons else ""


def print_video_why(plan: VideoPlan) -> int:
    """Print what the plan computes and why; always 0: nothing was tried."""
    return print_reasons(plan.folder, plan.rows.values(), len(plan.todo), explain_videos(plan))


def video_why_again(run: str, manifest: str, *, profile: str, stages: list[str], changes: list[str], verify: bool) -> int:
    """`e4s status RUN --why` for a run of videos: its own request planned anew with what is given instead. Writes nothing."""
    folder = VideoRunFolder(run)
    changed = request_again(VideoRequest, folder, manifest, profile=profile, stages=stages, changes=changes, verify=verify)
    return print_video_why(make_video_plan(changed, dry=True))


class _Explained:
    """The reasons of one plan, added up over its videos."""

    def __init__(self, plan: VideoPlan) -> None:
        self._plan = plan
        self._lookup = VideoLookup(plan, plan.store, [plan.rows[video] for video in plan.todo], plan.before, plan.previous)
        videos = plan.previous.get("videos", {})
        self._changes = _pass_changes(videos["prints"], plan.prints) if videos else {}
        before = {"sound": EncodeConfig.sound, **videos.get("output", {})}  # older runs do not name it
        for name in ("sound", "container"):
            if videos and before.get(name) != (wanted := getattr(plan.configs.output, name)):
                self._changes["join"] = f"config changed: output.{name} {before.get(name)} -> {wanted}"
        self._node_changes = stage_changes(plan.previous.get("nodes", {}), plan.graph.fingerprints)
        self._nodes_above = nodes_above(plan.graph)
        self._sources = {(row.source_sha256, row.source_face) for row in plan.before.values() if row.key}
        self._found: dict[tuple[str, str], Reason] = {}

    def reasons(self) -> list[Reason]:
        seen: set[str] = set()  # work on sources that several videos share
        for video in self._plan.todo:
            row, stand = self._plan.rows[video], self._lookup.videos[video]
            left = self._left(stand)
            for name, keys in left.items():
                first = next((above for above in _ABOVE[name] if above in left), "")
                for key in [""] if keys is None else keys:
                    self._note(name, self._why(name, row, key, first), not key)
            works = self._lookup.source_left(stand)
            for work in works:
                if work.key not in seen:
                    seen.add(work.key)
                    self._note(f"{work.node} (source)", self._why_source(row, work))
            last = [*(["source"] if works else []), *left]  # what is joined waits for the last of them
            self._note("join", self._why("join", row, "", last[-1] if last else ""))
        order = ["probe", *(f"{node.name} (source)" for node in self._plan.graph.nodes), "detect", "track", "tuning", "segment", "join"]
        return sorted(self._found.values(), key=lambda reason: order.index(reason.node))

    def _left(self, stand: VideoKeys) -> dict[str, list[str] | None]:
        """Pass -> keys of what is to be made; None where they are not known yet. Passes that are finished are left out."""
        keys: dict[str, list[str] | None] = {
            "probe": [stand.probe],
            "detect": stand.detect,
            "track": None if stand.track is None else [stand.track],
            "tuning": [] if "tuning" not in self._plan.prints else None if stand.tuning is None else [stand.tuning] if stand.tuning else [],
            "segment": stand.segments,
        }
        left = {name: None if of is None else [key for key in of if not self._lookup.is_there(key)] for name, of in keys.items()}
        return {name: of for name, of in left.items() if of is None or of}

    def _note(self, name: str, why: str, more: bool = False) -> None:
        before = self._found.get((name, why), Reason(name, why, 0))
        self._found[name, why] = Reason(name, why, before.works + (not more), before.more or more)

    def _why(self, name: str, row: VideoRow, key: str, first: str) -> str:
        """Why a pass runs for one video; `first` is a pass that must run before and whose result decides or is a part of this one's."""
        before = self._plan.before.get(row.id)
        if not self._plan.previous or before is None or not before.key:
            return NEW
        if changed := [what for what in _READS[name] if _input(row, what) != _input(before, what)]:
            return f"input changed: {' and '.join(changed)}"
        if name in self._changes:
            return self._changes[name]
        if above := [above for above in _ABOVE[name] if above in self._changes]:
            return f"upstream changed: {', '.join(above)}"
        if key or before.status != "done" or before.key != row.key:
            return self._gone(row, before, key)
        return f"upstream not there: {first}" if first else "output gone or changed"

    def _why_source(self, row: VideoRow, work: Work) -> str:
        before = self._plan.before.get(row.id)
        if not self._plan.previous:
            return NEW
        if _input(row, "source") not in self._sources:
            return "new picture"
        if work.node in self._node_changes:
            return self._node_changes[work.node]
        if above := [node for node in self._nodes_above[work.node] if node in self._node_changes]:
            return f"upstream changed: {', '.join(above)}"
        return self._gone(row, before, work.key)

    def _gone(self, row: VideoRow, before: VideoRow | None, key: str) -> str:
        """Why an artifact whose key is the same as before is not there."""
        if row.attempts or (before and before.status == "failed"):
            return AGAIN
        if key in self._lookup.gone:
            return self._lookup.gone[key]
        return "missing from the store" if before and before.status == "done" and before.key == row.key else UNFINISHED


def _input(row: VideoRow, what: str) -> tuple[str, int] | str:
    if what == "source":
        return row.source_sha256, row.source_face
    return row.video_sha256 if what == "video" else row.face_sha256 or row.face


def _pass_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Pass -> what differs of all that decides it beside its inputs; passes without a difference are left out."""
    now = json.loads(json.dumps(now))  # as run.json has it
    found = {name: "; ".join(_differences(name, before.get(name, {}), mine)) for name, mine in now.items() if before.get(name) != mine}
    return {name: text or "changed" for name, text in found.items()}


def _differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """`track.min_seen 3 -> 4` and the like: settings are named as in `--set`."""
    if not before:
        yield "not made before"
        return
    plain = {"min_face": "align.", "range": ""}
    for part, mine in now.items():
        old = before.get(part)
        if old == mine:
            continue
        if part == "version":
            yield f"stage version changed: {old} -> {mine}"
        elif part == "nodes":
            yield from (f"{node}: {text}" for node, text in stage_changes(old or {}, mine).items())
        elif part == "paste":
            (old_version, old_config), (version, config) = old or [None, {}], mine
            if old_version != version:
                yield f"paste: stage version changed: {old_version} -> {version}"
            yield from part_changes("config", old_config, config, "paste.")
        elif part in plain:
            yield from part_changes("config", {part: old}, {part: mine}, plain[part])
        else:
            yield from part_changes(part, old or {}, mine, {"config": f"{name}.", "weights": "", "libraries": ""}.get(part, f"{part}."))
