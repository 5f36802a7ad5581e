"""A small head that reads a face of 128 px off the embedded generator's features: inverting there costs a tenth of inverting at 1024 px.

The generator writes colours at its last layer only. Stopping after the block of 128 px, this head predicts what the finished picture,
shrunk to 128 px, would look like, from the features and the codes of the style layers that were left out. Training: `docs/encoder.md`.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.checks import check_shape
from e4s_models.mobile_stylegan import CODE_DIM, MobileStyleGAN, RegionRows

SIDE = 128  # px
LAYERS = (17, 18, 19, 20, 21, 22)
"""Style layers that act behind the features, or on them."""
_CHANNELS = 256  # of the generator's features at 128 px


class PreviewHead(nn.Module):
    """Features at 128 px and the codes of later layers -> RGB at 128 px."""

    mean_code: Tensor

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.style = nn.Linear(len(LAYERS) * CODE_DIM, _CHANNELS)
        self.style2 = nn.Linear(len(LAYERS) * CODE_DIM, hidden)
        self.first = nn.Conv2d(_CHANNELS, hidden, 1)
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.second = nn.Conv2d(hidden, hidden, 1)
        self.third = nn.Conv2d(hidden, hidden, 1)
        self.colours = nn.Conv2d(hidden, 3, 1)
        self.direct = nn.Conv2d(_CHANNELS, 3, 1)
        self.register_buffer("mean_code", torch.zeros(CODE_DIM))
        for style in (self.style, self.style2):  # at first every scale is 1, whatever the code
            nn.init.zeros_(style.weight)
            nn.init.ones_(style.bias)
        nn.init.zeros_(self.colours.weight)
        self.colours.bias.data.zero_()  # type: ignore[union-attr]

    @classmethod
    def load(cls, device: str = "cpu") -> Self:
        """The shipped head, ready for inference. Raises WeightsError."""
        from e4s_models.weights import load_shipped

        return load_shipped(cls(), "preview_head", device)

    def fit_direct(self, features: Tensor, colours: Tensor) -> None:
        """Start from the linear map that fits best: features (B, 256, 128, 128) -> RGB (B, 3, 128, 128), ridge regression in float64."""
        x = F.pad(features.permute(0, 2, 3, 1).flatten(0, 2).double(), (0, 1), value=1.0)  # (N, C + 1)
        y = colours.permute(0, 2, 3, 1).flatten(0, 2).double()
        ridge = 1e-4 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        solved = torch.linalg.solve(x.t() @ x + ridge, x.t() @ y).float()  # (C + 1, 3)
        with torch.no_grad():
            self.direct.weight.copy_(solved[:-1].t()[..., None, None])
            self.direct.bias.copy_(solved[-1])  # type: ignore[union-attr]

    def forward(self, features: Tensor, codes: Tensor, region_ids: Tensor | None) -> Tensor:
        """Colours of the finished picture at 128 px.

        Args:
            features: (B, 256, 128, 128), of `MobileStyleGAN.synthesize(..., stop_after=128)`.
            codes: (B, R, 23, 512), the codes that made them.
            region_ids: (B, H, W) uint8 in 0..R-1, or None for one region.

        Returns (B, 3, 128, 128), about [-1, 1].
        """
        check_shape(features, f"B {_CHANNELS} {SIDE} {SIDE}")
        batch = len(codes)
        if region_ids is None:
            rows = torch.zeros(batch, SIDE, SIDE, dtype=torch.int32, device=codes.device)
        else:
            rows = RegionRows(region_ids).at(SIDE).view(batch, SIDE, SIDE)
        return self.colours_of(features, codes[:, :, list(LAYERS)], rows)

    def colours_of(self, features: Tensor, late_codes: Tensor, rows: Tensor) -> Tensor:
        """As `forward`, of any part: features (B, 256, h, w), codes (B, R, 6, 512) of `LAYERS`, which code each pixel has (B, h, w)."""
        late = (late_codes - self.mean_code).flatten(2)  # (B, R, 6 * 512)
        x = features * _spread(self.style(late), rows)
        y = F.leaky_relu(self.first(x), 0.2)
        y = y + self.spatial(y)
        y = F.leaky_relu(self.second(y * _spread(self.style2(late), rows)), 0.2)
        y = y + F.leaky_relu(self.third(y), 0.2)
        rgb: Tensor = self.colours(y) + self.direct(x)
        return rgb


def _spread(styles: Tensor, rows: Tensor) -> Tensor:
    """Scales (B, R, C) given to pixels by their row (B, h, w): (B, C, h, w)."""
    picked = torch.stack([table.index_select(0, ids.flatten().int()) for table, ids in zip(styles, rows, strict=True)])  # (B, h * w, C)
    return picked.transpose(1, 2).reshape(len(rows), -1, *rows.shape[1:])


def preview(generator: MobileStyleGAN, head: PreviewHead, codes: Tensor, region_ids: Tensor | None) -> Tensor:
    """What `generator.synthesize(codes, region_ids)`, shrunk to 128 px, looks like: RGB (B, 3, 128, 128), about [-1, 1]."""
    return head(generator.synthesize(codes, region_ids, stop_after=SIDE), codes if codes.ndim == 4 else codes[:, None], region_ids)  # type: ignore[no-any-return]
