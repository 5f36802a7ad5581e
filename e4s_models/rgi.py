"""Regional GAN inversion (RGI): a face and its label map -> style codes per region -> a face, the network of the paper's Sec. 3.2.

The published weights are `E4S/iteration_300000.pt`, a dict with `state_dict` and, beside it, `latent_avg`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from e4s_models.published import Array, Case, Published
from e4s_models.rgi_encoder import CodeMapper, RegionEncoder
from e4s_models.stylegan2 import NUM_REGION_LAYERS, StyleGAN2


class RGI(nn.Module):
    """Encoder, code mapper and mask-guided generator."""

    def __init__(
        self,
        side: int = 1024,
        region_layers: int = NUM_REGION_LAYERS,
        encoder: RegionEncoder | None = None,
        generator: StyleGAN2 | None = None,
    ) -> None:
        """Build with random weights; `encoder` and `generator` replace the published architecture (then side and K are the latter's)."""
        super().__init__()
        self.encoder = encoder or RegionEncoder()
        self.generator = generator or StyleGAN2(side, region_layers)
        self.mapper = CodeMapper(
            self.encoder.vector_dim,
            self.encoder.num_regions,
            self.generator.num_layers,
            self.generator.region_layers,
            self.generator.code_dim,
        )

    def style_vectors(self, faces: Tensor, region_ids: Tensor) -> Tensor:
        """RGB (B, 3, S, S) float32 [-1, 1], region ids (B, H, H) uint8 -> style vectors (B, 12, 1280); an absent region's is 0."""
        vectors: Tensor = self.encoder(faces, region_ids)
        return vectors

    def style_codes(self, vectors: Tensor) -> Tensor:
        """Style vectors (B, 12, 1280) -> style codes (B, 12, 18, 512)."""
        codes: Tensor = self.mapper(vectors)
        return codes

    def generate(self, codes: Tensor, region_ids: Tensor) -> Tensor:
        """Style codes (B, 12, 18, 512), region ids (B, H, H) uint8 -> RGB (B, 3, 1024, 1024), about [-1, 1], not clipped."""
        faces: Tensor = self.generator(codes, region_ids)
        return faces

    def forward(self, faces: Tensor, region_ids: Tensor) -> Tensor:
        """Reconstruct faces from their own style codes; shapes as in `style_vectors` and `generate`."""
        return self.generate(self.style_codes(self.style_vectors(faces, region_ids)), region_ids)


_UNUSED = re.compile(r"G\.style\.|.*\.kernel$")  # the mapping network, which starts from random codes, and the blur constants
_NAMES = (
    (r"^encoder\.input_layer\.0", "encoder.conv"),
    (r"^encoder\.input_layer\.2", "encoder.prelu"),
    (r"^encoder\.body\.", "encoder.blocks."),
    (r"\.shortcut_layer\.0", ".shortcut"),
    (r"\.res_layer\.1", ".conv1"),
    (r"\.res_layer\.2", ".prelu"),
    (r"\.res_layer\.3", ".conv2"),
    (r"\.res_layer\.5\.fc1", ".excite.reduce"),
    (r"\.res_layer\.5\.fc2", ".excite.expand"),
    (r"^latent_avg", "mapper.latent_avg"),
    (r"^MLPs\.", "mapper.mlps."),
    (r"\.mlp\.0", ".hidden"),
    (r"\.mlp\.2", ".out"),
    (r"^G\.input\.input", "generator.constant"),
    (r"^G\.noises\.noise_(\d+)", r"generator.convs.\1.noise"),
    (r"\.conv\.modulation", ".conv.style"),
    (r"\.noise\.weight", ".noise_strength"),
    (r"\.activate\.bias", ".bias"),
)
_FIRST_OF = {"G.conv1": "generator.convs.0", "G.to_rgb1": "generator.to_rgbs.0"}


def rename(key: str) -> str | None:
    """Published key -> ours; None for what inversion and generation do not need."""
    if _UNUSED.match(key):
        return None
    for pattern, ours in _NAMES:
        key = re.sub(pattern, ours, key)
    for first, ours in _FIRST_OF.items():
        key = re.sub(rf"^{re.escape(first)}(?=\.)", ours, key)
    return re.sub(r"^G\.(convs|to_rgbs)\.(\d+)", lambda found: f"generator.{found[1]}.{int(found[2]) + 1}", key)


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    assert isinstance(network, RGI)
    faces = torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1
    region_ids = torch.from_numpy(case["label_u8"])[None]
    vectors = network.style_vectors(faces, region_ids)
    codes = network.style_codes(vectors)
    image = network.generate(codes, region_ids)  # (1, 3, 1024, 1024)
    stats = torch.stack([image.mean(), image.std(), image.min(), image.max()])
    return {
        "style_vectors": vectors.numpy(),
        "style_codes_sub": codes[:, :, [0, 6, 12, 13, 17], ::16].numpy(),
        "image_crop_center": image[:, :, 480:544, 480:544].numpy(),
        "image_crop_a": image[:, :, 256:320, 341:405].numpy(),
        "image_down8": nn.functional.avg_pool2d(image, 8).numpy(),
        "image_stats": stats.double().numpy(),
    }


PUBLISHED_RGI = Published(name="rgi", file="E4S/iteration_300000.pt", parts=("state_dict",), build=RGI, rename=rename, run=_run_reference)
