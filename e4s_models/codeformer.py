"""CodeFormer face restoration (Zhou et al., NeurIPS 2022), the network of the published `codeformer/codeformer.pth`.

An encoder turns the face into 16 x 16 positions, a transformer predicts for each the entry of a learned codebook of good faces, and a
generator draws the face from those entries; `fidelity` says how much of the encoder's own features it may use on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, interpolate, pad, scaled_dot_product_attention, silu

from e4s_models.checks import check_shape
from e4s_models.published import Array, Case, Published

_EPSILON = 1e-5  # added to variances of the adaptive normalisation


class Restoration(NamedTuple):
    faces: Tensor  # (B, 3, 512, 512) RGB [-1, 1], can overshoot a little
    codes: Tensor  # (B, 256) int64, codebook entries by rows of the 16 x 16 positions


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _Residual(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut: nn.Module = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return cast(Tensor, self.shortcut(x) + y)


class _SpatialAttention(nn.Module):
    """Every position attends to all others, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (layer(y).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))  # [B, HW, C]
        y = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        return cast(Tensor, x + self.project(y))


class _Halve(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(pad(x, (0, 1, 0, 1))))  # right and below only


class _Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(interpolate(x, scale_factor=2.0)))


def _middle(channels: int) -> list[nn.Module]:
    return [_Residual(channels, channels), _SpatialAttention(channels), _Residual(channels, channels)]


class _Encoder(nn.Module):
    """Faces to features at 1/32 of the size.

    One flat list of blocks, as published; `taps` maps the index of each finer level's last block to the size (px) of its features.
    """

    def __init__(self, side: int, widths: Sequence[int], code_width: int) -> None:
        super().__init__()
        self.taps: dict[int, int] = {}
        self.blocks = nn.ModuleList([nn.Conv2d(3, widths[0], 3, 1, 1)])
        inputs = widths[0]
        for level, outputs in enumerate(widths):
            coarsest = level == len(widths) - 1
            for _ in range(2):
                self.blocks.append(_Residual(inputs, outputs))
                inputs = outputs
                if coarsest:
                    self.blocks.append(_SpatialAttention(outputs))
            if not coarsest:
                self.taps[len(self.blocks) - 1] = side >> level
                self.blocks.append(_Halve(outputs))
        self.blocks.extend([*_middle(inputs), _norm(inputs), nn.Conv2d(inputs, code_width, 3, 1, 1)])

    def forward(self, faces: Tensor, kept: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Faces -> features [B, 256, 16, 16] and, for each size in `kept`, the features of that size."""
        x, features = faces, {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if (size := self.taps.get(index, 0)) in kept:
                features[size] = x
        return x, features


class _Generator(nn.Module):
    """Codebook entries to faces. `taps` maps the index of a block to the size (px) of the features that a fusion may change after it."""

    def __init__(self, side: int, widths: Sequence[int], code_width: int) -> None:
        super().__init__()
        self.taps: dict[int, int] = {}
        inputs = widths[-1]
        self.blocks = nn.ModuleList([nn.Conv2d(code_width, inputs, 3, 1, 1), *_middle(inputs)])
        for level, outputs in reversed(list(enumerate(widths))):
            coarsest = level == len(widths) - 1
            if not coarsest:
                self.taps[len(self.blocks)] = side >> level  # the level's first residual block
            for _ in range(2):
                self.blocks.append(_Residual(inputs, outputs))
                inputs = outputs
                if coarsest:
                    self.blocks.append(_SpatialAttention(outputs))
            if level > 0:
                self.blocks.append(_Double(outputs))
        self.blocks.extend([_norm(inputs), nn.Conv2d(inputs, 3, 3, 1, 1)])

    def forward(self, x: Tensor, fuse: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
        """Features [B, 256, 16, 16] -> faces; `fuse` changes the features of the sizes that it names."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if (size := self.taps.get(index, 0)) in fuse:
                x = fuse[size](x)
        return x


class _TransformerLayer(nn.Module):
    """Self-attention and a perceptron, each normalised before; positions are added to queries and keys only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        value = self.norm1(tokens)
        query = value + positions
        tokens = tokens + self.attention(query, query, value, need_weights=False)[0]
        return cast(Tensor, tokens + self.linear2(gelu(self.linear1(self.norm2(tokens)))))


class _Fusion(nn.Module):
    """Controllable feature transformation (paper, equation 6): the encoder's features scale and shift the generator's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.merge = _Residual(2 * width, width)
        self.scale = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, 1, 1))
        self.shift = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, encoded: Tensor, generated: Tensor, fidelity: float) -> Tensor:
        merged = self.merge(torch.cat([encoded, generated], dim=1))
        return cast(Tensor, generated + fidelity * (generated * self.scale(merged) + self.shift(merged)))


class CodeFormer(nn.Module):
    """Blind restoration of an aligned face. The defaults are the published network; smaller ones are for tests."""

    def __init__(
        self,
        side: int = 512,  # px
        widths: Sequence[int] = (64, 128, 128, 256, 256, 512),  # channels at full size, half, ...; multiples of 32
        connections: Sequence[int] = (32, 64, 128, 256),  # px, sizes at which the encoder's features reach the generator
        codes: int = 1024,
        code_width: int = 256,
        width: int = 512,  # of the transformer
        heads: int = 8,
        layers: int = 9,
    ) -> None:
        super().__init__()
        sizes = {side >> level: channels for level, channels in enumerate(widths[:-1])}
        if unknown := set(connections) - set(sizes):
            raise ValueError(f"expected connections among the sizes {sorted(sizes)}, got {sorted(unknown)}")
        self.side = side
        self.encoder = _Encoder(side, widths, code_width)
        self.to_tokens = nn.Linear(code_width, width)
        self.positions = nn.Parameter(torch.zeros((side >> (len(widths) - 1)) ** 2, width))
        self.transformer = nn.ModuleList([_TransformerLayer(width, heads) for _ in range(layers)])
        self.norm_out = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, codes, bias=False)
        self.codebook = nn.Parameter(torch.randn(codes, code_width) / codes)
        self.fusions = nn.ModuleDict({str(size): _Fusion(sizes[size]) for size in connections})
        self.generator = _Generator(side, widths, code_width)

    def forward(self, faces: Tensor, fidelity: float = 0.8, adapt: bool = True) -> Restoration:
        """Restore aligned faces: RGB (B, 3, 512, 512) float32 [-1, 1] -> the same, with the codes that were chosen.

        `fidelity`: from 0, the codebook alone, to 1, as near to the input as the network can. `adapt`: give the codebook's features
        the encoder's mean and standard deviation per channel, which keeps the input's colours.
        """
        check_shape(faces, f"B 3 {self.side} {self.side}")
        if not 0 <= fidelity <= 1:
            raise ValueError(f"expected a fidelity in [0, 1], got {fidelity}")
        sizes = [int(size) for size in self.fusions] if fidelity > 0 else []
        encoded, kept = self.encoder(faces, sizes)
        codes = self.code_logits(encoded).argmax(2)  # [B, 256]
        features = embedding(codes, self.codebook).transpose(1, 2).reshape(encoded.shape)
        if adapt:
            features = _match_statistics(features, encoded)
        fuse = {size: partial(self.fusions[str(size)], kept[size], fidelity=fidelity) for size in sizes}
        return Restoration(self.generator(features, fuse), codes)

    def code_logits(self, encoded: Tensor) -> Tensor:
        """Score the codebook's entries: encoder features (B, 256, 16, 16) -> logits (B, 256 positions, 1024)."""
        tokens = self.to_tokens(encoded.flatten(2).transpose(1, 2))  # [B, 256, 512]
        for layer in self.transformer:
            tokens = layer(tokens, self.positions)
        return cast(Tensor, self.to_logits(self.norm_out(tokens)))


def _match_statistics(features: Tensor, like: Tensor) -> Tensor:
    """Adaptive instance normalisation (Huang and Belongie, ICCV 2017): `features` with the mean and deviation per channel of `like`."""
    variance, mean = torch.var_mean(features, (2, 3), keepdim=True)  # [B, C, 1, 1]
    variance_like, mean_like = torch.var_mean(like, (2, 3), keepdim=True)
    return (features - mean) * ((variance_like + _EPSILON) / (variance + _EPSILON)).sqrt() + mean_like


_NAMES = {
    r"^ft_layers\.(\d+)\.self_attn\.": r"transformer.\1.attention.",
    r"^ft_layers\.": "transformer.",
    r"^fuse_convs_dict\.": "fusions.",
    r"\.encode_enc\.": ".merge.",
    r"^idx_pred_layer\.0\.": "norm_out.",
    r"^idx_pred_layer\.1\.": "to_logits.",
    r"^position_emb$": "positions",
    r"^feat_emb\.": "to_tokens.",
    r"^quantize\.embedding\.weight$": "codebook",
    r"\.conv_out\.": ".shortcut.",
    r"\.q\.": ".query.",
    r"\.k\.": ".key.",
    r"\.v\.": ".value.",
    r"\.proj_out\.": ".project.",
}


def _rename(key: str) -> str:
    for pattern, name in _NAMES.items():
        key = re.sub(pattern, name, key)
    return key


def _run_reference(network: nn.Module, case: Case) -> dict[str, Array]:
    faces, codes = network(torch.from_numpy(case["image_u8"]).permute(2, 0, 1)[None] / 127.5 - 1)
    return {
        "out_sub": faces[:, :, ::4, ::4].numpy(),
        "out_crop": faces[:, :, 200:264, 200:264].numpy(),
        "code_top1": codes.to(torch.int32).numpy(),
    }


PUBLISHED_CODEFORMER = Published(
    name="codeformer",
    file="codeformer/codeformer.pth",
    parts=("params_ema",),
    build=CodeFormer,
    rename=_rename,
    run=_run_reference,
)
