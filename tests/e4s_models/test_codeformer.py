"""CodeFormer's names and shapes against the published file, its behaviour on a small configuration.

`check_reference` compares its pictures and codes with the published network's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from e4s_models.codeformer import PUBLISHED_CODEFORMER, CodeFormer, _match_statistics

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def small() -> CodeFormer:
    torch.manual_seed(0)
    network = CodeFormer(side=32, widths=(32, 32, 64), connections=(16,), codes=24, code_width=8, width=16, heads=2, layers=2)
    torch.nn.init.normal_(network.positions)
    torch.nn.init.normal_(network.codebook)
    return network.eval().requires_grad_(False)


def test_names_and_shapes_are_the_published_ones() -> None:
    entries = json.loads((DATA / "codeformer.json").read_text())["keys"]
    published = {PUBLISHED_CODEFORMER.rename(key): tuple(entry["shape"]) for key, entry in entries.items()}
    with torch.device("meta"):
        network = CodeFormer()
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == published


def test_features_pass_at_the_published_blocks() -> None:
    with torch.device("meta"):
        network = CodeFormer()
    assert network.encoder.taps == {2: 512, 5: 256, 8: 128, 11: 64, 14: 32}
    assert network.generator.taps == {9: 32, 12: 64, 15: 128, 18: 256, 21: 512}


def test_a_batch_equals_its_singles(small: CodeFormer) -> None:
    faces = torch.rand(2, 3, 32, 32) * 2 - 1
    both, first, second = small(faces), small(faces[:1]), small(faces[1:])
    assert both.faces.shape == faces.shape
    assert both.codes.shape == (2, 64)  # 8 x 8 positions
    assert torch.equal(both.codes, torch.cat([first.codes, second.codes]))
    torch.testing.assert_close(both.faces, torch.cat([first.faces, second.faces]), rtol=1e-4, atol=1e-5)


def test_without_fidelity_and_adaptation_the_codes_alone_make_the_face(small: CodeFormer) -> None:
    face = torch.rand(1, 3, 32, 32) * 2 - 1
    restored, codes = small(face, fidelity=0, adapt=False)
    drawn = small.generator(small.codebook[codes].transpose(1, 2).reshape(1, 8, 8, 8), {})
    torch.testing.assert_close(restored, drawn)
    assert not torch.allclose(restored, small(face, fidelity=0, adapt=True).faces)
    assert not torch.allclose(restored, small(face, fidelity=1, adapt=False).faces)


def test_adaptation_gives_the_other_statistics() -> None:
    torch.manual_seed(0)
    features, like = torch.randn(2, 4, 8, 8), 3 * torch.randn(2, 4, 8, 8) + 5
    adapted = _match_statistics(features, like)
    torch.testing.assert_close(adapted.mean((2, 3)), like.mean((2, 3)))
    torch.testing.assert_close(adapted.std((2, 3)), like.std((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_match_statistics(features, features), features)


def test_refuses_what_it_cannot_use(small: CodeFormer) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        small(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"fidelity in \[0, 1\], got 2"):
        small(torch.zeros(1, 3, 32, 32), fidelity=2)
    with pytest.raises(ValueError, match=r"among the sizes \[16, 32\], got \[8\]"):
        CodeFormer(side=32, widths=(32, 32, 64), connections=(8,))
