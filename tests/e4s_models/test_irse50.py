"""The identity network against the published one, and what a training loss needs of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from e4s_models.irse50 import PUBLISHED_IRSE50, IrSe50
from e4s_models.published import compare, filled_state, load_published

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def small() -> IrSe50:
    torch.manual_seed(0)
    return IrSe50(units=(1, 2), widths=(16, 32), side=16).eval()


def test_equals_the_published_network() -> None:
    with np.load(DATA / "irse50_case0.npz") as stored:
        case = dict(stored)
    spec = json.loads((DATA / "irse50.json").read_text())
    network = load_published(PUBLISHED_IRSE50, filled_state(PUBLISHED_IRSE50, spec, case))  # refuses keys that do not fit
    with torch.inference_mode():
        outputs = PUBLISHED_IRSE50.run(network, case)
    check = compare("irse50", "case0", "embedding", outputs["embedding"], case["embedding"])
    assert check.passed, check


def test_embeddings_are_unit_vectors(small: IrSe50) -> None:
    embeddings = small(torch.rand(3, 3, 16, 16) * 2 - 1)
    assert embeddings.shape == (3, 512)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_a_batch_equals_its_singles(small: IrSe50) -> None:
    faces = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(small(faces), torch.cat([small(faces[:1]), small(faces[1:])]))


def test_a_frozen_network_passes_gradients_to_the_faces(small: IrSe50) -> None:
    faces = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    (1 - (small(faces[:1]) * small(faces[1:])).sum()).backward()
    assert faces.grad is not None
    assert (faces.grad.abs().sum((1, 2, 3)) > 0).all()


def test_refuses_another_size() -> None:
    with torch.device("meta"):
        network = IrSe50()
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 112, 112\), got \(1, 3, 256, 256\)"):
        network(torch.zeros(1, 3, 256, 256))
