from __future__ import annotations

from typing import Any

import numpy as np

from e4s_models.regions import Region
from tasks.inpaint import BACKENDS, MembraneConfig, inpaint
from tasks.stage import Outputs

SIDE = 256


def scene(new: int = 180, old: int = 120) -> dict[str, Any]:
    """A new face (columns 60-180) in a wider target face (to 200); the strip between them is the mismatch region."""
    regions = np.zeros((SIDE, SIDE), np.uint8)
    regions[40:220, 60:200] = Region.SKIN
    mask, hole = np.zeros_like(regions), np.zeros_like(regions)
    mask[40:220, 60:180], hole[100:220, 180:200] = 255, 255
    target = np.full((SIDE, SIDE, 3), 30, np.uint8)
    target[regions > 0] = old
    blended = np.where((mask > 0)[..., None], np.uint8(new), target)
    return {"blended": blended, "target_face": target, "target_regions": regions, "hole": hole, "mask": mask}


def run(inputs: dict[str, Any], config: MembraneConfig | None = None) -> Outputs:
    return inpaint(inputs, config or MembraneConfig())


def test_hole_takes_the_new_faces_colour_and_nothing_else_changes() -> None:
    inputs = scene()
    out = run(inputs)["inpainted"]
    hole = inputs["hole"] > 0
    assert np.array_equal(out[~hole], inputs["blended"][~hole])
    assert np.abs(out[110:210, 181:194].astype(int) - 180).max() <= 2  # beside the new face
    assert (inputs["blended"][hole] == 120).all()


def test_targets_shading_stays_and_its_texture_goes() -> None:
    inputs = scene()
    shade = np.linspace(0, 40, 20).astype(np.uint8)
    inputs["target_face"][100:220, 180:200] = 120 - shade[None, :, None]  # darker towards the outline
    inputs["target_face"][100:220:2, 180:200] -= 30  # the target's stubble
    inputs["blended"] = np.where((inputs["mask"] > 0)[..., None], np.uint8(180), inputs["target_face"])
    out = run(inputs)["inpainted"].astype(int)
    assert out[150:170, 183, 0].mean() > out[150:170, 195, 0].mean() + 5
    assert np.abs(np.diff(out[130:190, 185, 0])).max() <= 2


def test_new_faces_texture_is_mirrored_into_the_hole() -> None:
    inputs = scene()
    inputs["blended"][40:220:4, 60:180] += 20
    out = run(inputs)["inpainted"].astype(int)
    assert np.ptp(out[130:150, 186, 0]) >= 15


def test_far_from_the_new_face_the_target_stays() -> None:
    inputs = scene()
    inputs["mask"][:, 100:] = 0  # 80 px away
    inputs["blended"] = np.where((inputs["mask"] > 0)[..., None], np.uint8(180), inputs["target_face"])
    out = run(inputs)["inpainted"]
    assert np.abs(out.astype(int) - inputs["blended"]).max() <= 1


def test_no_hole_or_no_face_changes_nothing() -> None:
    for emptied in ("hole", "mask"):
        inputs = scene()
        inputs[emptied] = np.zeros_like(inputs[emptied])
        assert np.array_equal(run(inputs)["inpainted"], inputs["blended"])


def test_paste_mask_is_face_or_hole_for_both_backends() -> None:
    inputs = scene()
    wanted = np.where((inputs["mask"] > 0) | (inputs["hole"] > 0), 255, 0)
    assert list(BACKENDS) == ["membrane", "none"]
    for stage in BACKENDS.values():
        (result,) = stage.run(None, stage.config(), [inputs])
        assert isinstance(result, dict) and set(result) == set(stage.writes)
        assert result["mask"].dtype == np.uint8 and np.array_equal(result["mask"], wanted)
    (kept,) = BACKENDS["none"].run(None, BACKENDS["none"].config(), [inputs])
    assert isinstance(kept, dict) and np.array_equal(kept["inpainted"], inputs["blended"])


def test_deterministic() -> None:
    assert np.array_equal(run(scene())["inpainted"], run(scene())["inpainted"])
