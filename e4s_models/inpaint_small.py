"""Face inpainting small enough for every pair: what a smooth continuation of the surroundings lacks in the mismatch region (Eq. 17, 26).

The architecture is the published one (`e4s_models.inpaint_net`: an encoder, a StyleGAN2 decoder, the area ratio of the hole deciding how
much of the encoder enters), narrower, at 128 px. It begins as the smooth continuation itself and learns what to add. Trained by
`e4s train inpaint`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from e4s_models.inpaint_net import InpaintNet

_CHANNELS = (16, 32, 64, 96)  # at 128, 64, 32 and 16 px
_CODE_DIM = 64


class SmallInpaintNet(InpaintNet):
    """Faces with holes -> whole faces."""

    def __init__(self) -> None:
        """Build with random weights, except that nothing is added yet to the smooth continuation."""
        super().__init__(_CHANNELS, _CODE_DIM)
        for name, parameter in self.named_parameters():
            if ".to_image.weight" in name or ".to_image.bias" in name:
                nn.init.zeros_(parameter)

    def forward(self, faces: Tensor, holes: Tensor) -> Tensor:
        """Paint whole faces anew: RGB (B, 3, 128, 128) float32 [-1, 1], holes (B, 1, 128, 128) float32 {0, 1} -> (B, 3, 128, 128).

        What the faces show in the holes is not looked at. The output is not clipped; `fill` puts only the holes into the faces.
        """
        added = super().forward(faces, holes) + 1  # the published network paints in [0, 1]
        return continued(faces, holes) + added


def continued(faces: Tensor, holes: Tensor) -> Tensor:
    """Continue the surroundings of holes smoothly into them: (B, C, H, W), (B, 1, H, W) in [0, 1] -> (B, C, H, W), equal outside.

    A pyramid of means of what is known (push-pull); H and W must be equal powers of two.
    """
    known = 1 - holes
    sums = [torch.cat([faces * known, known], dim=1)]
    while sums[-1].shape[-1] > 1:
        sums.append(avg_pool2d(sums[-1], 2))
    whole = sums[-1][:, :-1] / sums[-1][:, -1:].clamp(min=1e-6)
    for level in reversed(sums[:-1]):
        enlarged = interpolate(whole, level.shape[-2:], mode="bilinear")
        whole = level[:, :-1] + (1 - level[:, -1:]) * enlarged
    return whole
