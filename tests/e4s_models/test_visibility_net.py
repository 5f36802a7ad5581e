"""The visibility network: shapes, batches, and a trunk that is the face parser's."""

from __future__ import annotations

import pytest
import torch

from e4s_models.face_parser import FaceParser
from e4s_models.visibility_net import Seen, VisibilityNet


@pytest.fixture(scope="module")
def network() -> VisibilityNet:
    torch.manual_seed(0)
    return VisibilityNet().eval()


@torch.no_grad()
def test_scores_per_pixel_at_the_size_that_came(network: VisibilityNet) -> None:
    for height, width in ((256, 256), (64, 96)):
        assert network(torch.rand(2, 3, height, width) * 2 - 1).shape == (2, len(Seen), height, width)


@torch.no_grad()
def test_a_batch_gives_what_its_faces_give(network: VisibilityNet) -> None:
    faces = torch.rand(3, 3, 64, 64) * 2 - 1
    singles = torch.cat([network(face[None]) for face in faces])
    torch.testing.assert_close(network(faces), singles, rtol=1e-4, atol=1e-5)


def test_shapes_that_cannot_be_are_refused(network: VisibilityNet) -> None:
    with pytest.raises(ValueError, match=r"multiples of 32, got 100 x 64"):
        network(torch.zeros(1, 3, 100, 64))
    with pytest.raises(ValueError, match="expected shape"):
        network(torch.zeros(3, 64, 64))


@torch.no_grad()
def test_it_begins_with_the_parsers_features() -> None:
    parser, network = FaceParser.load("cpu"), VisibilityNet().eval()
    network.start_from(parser)
    x = torch.randn(1, 3, 64, 64)
    wanted = parser.cp.resnet(x)
    features = network.stem(x)
    for level, feature in zip(network.levels, wanted, strict=False):
        features = level(features)
        torch.testing.assert_close(features, feature)
    learning = {name.split(".")[0] + name.split(".")[1] for name, value in network.named_parameters() if value.requires_grad}
    assert not learning & {"stem0", "stem1", "levels0", "levels1"}
    assert "levels2" in learning


def test_it_is_small() -> None:
    assert 2 * sum(value.numel() for value in VisibilityNet().state_dict().values()) < 20e6  # bytes in float16
