"""The restoration network's names and shapes against the published file, its arithmetic on small configurations.

`check_reference` compares its pictures with the published network's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from e4s_models.gpen import PUBLISHED_GPEN, Gpen

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def small() -> Gpen:
    torch.manual_seed(0)
    network = Gpen(side=32, widest=8, latent=16, mapping_layers=2).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "detail_gain")):
            torch.nn.init.normal_(parameter)
    return network.requires_grad_(False)


def test_names_and_shapes_are_the_published_ones() -> None:
    entries = json.loads((DATA / "gpen.json").read_text())["keys"]
    published = {ours: tuple(entry["shape"]) for key, entry in entries.items() if (ours := PUBLISHED_GPEN.rename(key)) is not None}
    with torch.device("meta"):
        network = Gpen()
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == published


def test_a_batch_equals_its_singles(small: Gpen) -> None:
    faces = torch.rand(2, 3, 32, 32) * 2 - 1
    restored = small(faces)
    assert restored.shape == faces.shape
    torch.testing.assert_close(restored, torch.cat([small(faces[:1]), small(faces[1:])]))
    assert not torch.allclose(restored[0], restored[1])
    assert torch.equal(restored, small(faces))  # no random noise


def test_refuses_another_size(small: Gpen) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        small(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="power of 2"):
        Gpen(side=500)
