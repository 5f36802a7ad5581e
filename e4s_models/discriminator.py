"""StyleGAN2's discriminator (arXiv 1912.04958, configuration F), against which the paper's generator is trained (Eq. 22).

Layout and names of a checkpoint: those of the PyTorch port that the published E4S code trains (`rename` maps them).
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

import torch
from torch import Tensor, nn

from e4s_models.checks import check_shape
from e4s_models.stylegan2_layers import EPSILON, EqualConv, EqualLinear

GROUP = 4  # samples whose spread is measured together


def minibatch_spread(x: Tensor, group: int = GROUP) -> Tensor:
    """One more channel, which says how much samples differ: (B, C, H, W) -> (B, C + 1, H, W).

    Sample i is compared with the samples i + k * B / group: their standard deviation (biased, plus epsilon), averaged over channels and
    pixels. A batch smaller than `group` is one group. Raises ValueError when the groups do not come out even.
    """
    bound = check_shape(x, "B C H W")
    batch, group = bound["B"], min(bound["B"], group)
    if batch % group:
        raise ValueError(f"a batch of {batch} cannot be split into groups of {group}: give a multiple of {group}, or fewer than {group}")
    grouped = x.reshape(group, batch // group, *x.shape[1:])
    spread = (grouped.var(dim=0, unbiased=False) + EPSILON).sqrt().mean(dim=(1, 2, 3))  # (B / group,)
    return torch.cat([x, spread.repeat(group).view(batch, 1, 1, 1).expand(-1, -1, *x.shape[2:])], dim=1)


class _Halving(nn.Module):
    """Residual block: two convolutions, the second of stride 2, and a linear shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(inputs, inputs, 3)
        self.conv2 = EqualConv(inputs, outputs, 3, down=True)
        self.shortcut = EqualConv(inputs, outputs, 1, down=True, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x)) + self.shortcut(x)
        return y / math.sqrt(2)


class Discriminator(nn.Module):
    """Faces -> how real they look. The defaults are the published widths; smaller ones are for tests."""

    def __init__(self, side: int = 1024, max_width: int = 512, width_times_side: int = 1 << 15) -> None:
        """Build with random weights.

        Args:
            side: px of the picture, a power of two; 256, 512 and 1024 are usual.
            max_width: channels of the small feature maps.
            width_times_side: bounds the channels of the large ones: 32 at 1024 px.
        """
        super().__init__()
        if side < 8 or side & (side - 1):
            raise ValueError(f"the picture's side must be a power of two from 8 px on, got {side}")
        self.side = side
        widths = [min(max_width, width_times_side >> level) for level in range(side.bit_length() - 1, 1, -1)]  # from `side` to 4 px
        self.stem = EqualConv(3, widths[0], 1)
        self.blocks = nn.ModuleList(_Halving(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.last = EqualConv(widths[-1] + 1, widths[-1], 3)
        self.hidden = EqualLinear(widths[-1] * 4 * 4, widths[-1], activation=True)
        self.score = EqualLinear(widths[-1], 1)

    def forward(self, faces: Tensor) -> Tensor:
        """RGB (B, 3, side, side) float32 [-1, 1] -> logits (B, 1), the higher the more real.

        A score depends on the other samples of its group, see `minibatch_spread`, which says what B may be.
        """
        check_shape(faces, f"B 3 {self.side} {self.side}")
        x = self.stem(faces.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = self.last(minibatch_spread(x))  # (B, C, 4, 4)
        score: Tensor = self.score(self.hidden(x.flatten(1)))
        return score


_NAMES = (
    (r"^convs\.0\.[01]\.", "stem."),
    (r"^convs\.(\d+)\.(conv[12]|skip)\.\d\.", lambda found: f"blocks.{int(found[1]) - 1}.{found[2].replace('skip', 'shortcut')}."),
    (r"^final_conv\.[01]\.", "last."),
    (r"^final_linear\.0\.", "hidden."),
    (r"^final_linear\.1\.", "score."),
)


def rename(key: str) -> str | None:
    """Published key -> ours; None for the blur, a constant."""
    if key.endswith(".kernel"):
        return None
    for pattern, ours in _NAMES:
        key = re.sub(pattern, ours, key)
    return key
