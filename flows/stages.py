"""The pipeline: the stages that a pair, and a frame of a video, goes through, in reading order."""

from __future__ import annotations

from tasks.graph import Node, Ref

_REGIONS = "visibility.regions|parse.regions"
_TARGET = {"target_face": "target.align.face", "target_regions": "target.visibility.regions|target.parse.regions"}
_DRIVEN_REGIONS = "reenact.regions|parse_driven.regions"

PAIR_NODES: tuple[Node, ...] = (
    Node("align", "align", "image", {"image": "image", "face_index": "face_index"}, checkpoint=True),
    Node("mesh", "mesh", "image", {"face": "align.face"}, checkpoint=True),
    Node("parse", "parse", "image", {"face": "align.face"}, checkpoint=True),
    Node("visibility", "visibility", "image", {"face": "align.face", "regions": "parse.regions"}),
    Node("light", "light", "image", {"face": "align.face", "regions": _REGIONS}),
    Node(
        "encode",
        "encode",
        "image",
        {"image": "image", "face": "align.face", "labels": _REGIONS, "crop_to_frame": "align.crop_to_frame"},
        checkpoint=True,
    ),
    Node(
        "reenact",
        "reenact",
        "pair",
        {
            "source_face": "source.align.face",
            "source_points": "source.mesh.points",
            "source_blendshapes": "source.mesh.blendshapes",
            "source_regions": "source.visibility.regions|source.parse.regions",
            "target_face": "target.align.face",
            "target_points": "target.mesh.points",
            "target_blendshapes": "target.mesh.blendshapes",
        },
    ),
    Node("parse_driven", "parse", "pair", {"face": "reenact.driven"}),
    Node(
        "encode_driven",
        "encode",
        "pair",
        {
            "image": "source.image",
            "face": "reenact.driven",
            "labels": _DRIVEN_REGIONS,
            "crop_to_frame": "target.align.crop_to_frame",
        },
        checkpoint=True,  # most of a pair's time, in 0.3 MB
    ),
    Node(
        "tune",
        "tune",
        "pair",
        {
            "face": "reenact.driven",
            "regions": _DRIVEN_REGIONS,
            "codes": "encode_driven.codes",
            "styles": "encode_driven.styles",
        },
        checkpoint=True,
    ),
    Node(
        "swap",
        "swap",
        "pair",
        {
            "driven": "reenact.driven",
            "driven_regions": _DRIVEN_REGIONS,
            "visible": "reenact.visible",
            "turned": "reenact.turned",
            "source_crop_to_frame": "source.align.crop_to_frame",
            "driven_codes": "encode_driven.codes",
            "target_codes": "target.encode.codes",
            "driven_styles": "encode_driven.styles",
            "target_styles": "target.encode.styles",
            "target_to_canvas": "target.encode.to_canvas",
            "tuning": "tune.tuning",
            **_TARGET,
        },
    ),
    Node("parse_swapped", "parse", "pair", {"face": "swap.swapped"}),
    Node(
        "recolor",
        "recolor",
        "pair",
        {
            "swapped": "swap.swapped",
            "swapped_regions": "swap.swapped_regions",
            "seen_regions": "parse_swapped.regions",
            "target_light": "target.light.skin",
            "mask": "swap.mask",
            **_TARGET,
        },
    ),
    Node("enhance", "enhance", "pair", {"face": "recolor.recolored"}),
    Node(
        "blend",
        "blend",
        "pair",
        {
            "face": "enhance.enhanced",
            "hole": "swap.hole",
            "mask": "swap.mask",
            "swapped_regions": "swap.swapped_regions",
            **_TARGET,
        },
    ),
    Node(
        "inpaint",
        "inpaint",
        "pair",
        {
            "blended": "blend.blended",
            "hole": "swap.hole",
            "mask": "swap.mask",
            "swapped_regions": "swap.swapped_regions",
            **_TARGET,
        },
    ),
    Node(
        "paste",
        "paste",
        "pair",
        {"image": "target.image", "face": "inpaint.inpainted", "mask": "inpaint.mask", "crop_to_frame": "target.align.crop_to_frame"},
        checkpoint=True,
    ),
)
"""The paper's eight stages on a pair, in reading order, with three helpers: mesh, enhance and paste."""

PAIR_RESULT: Ref = ("paste", "result")

VIDEO_NODES = tuple(node for node in PAIR_NODES if node.name != "paste")
"""The stages of a pair; the target is a frame whose face is followed, and its pasting is done in the frame's own planes."""

FRAME_RESULT: Ref = ("inpaint", "inpainted")
