"""Face reenactment: one-shot free-view talking heads (SPADE generator, 256 px).

The networks of the published `faceVid2Vid/00000189-checkpoint.pth.tar`; `rename` maps its key names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, grid_sample, instance_norm, interpolate, leaky_relu

from e4s_models.checks import check_shape
from e4s_models.facevid2vid_motion import ConvBlock, DenseMotion, DownBlock, HeadMotion, KeypointDetector, MotionEstimator, place_keypoints
from e4s_models.published import Amplified, Array, Case, Published


@dataclass(frozen=True, kw_only=True)
class FaceVid2VidConfig:
    """Sizes of the networks; the defaults are the published ones."""

    keypoints: int = 15
    bins: int = 66  # of 3 degrees, per pose angle
    feature_channels: int = 32  # of the appearance volume
    depth: int = 16  # of the appearance volume and the keypoint heat maps
    width: int = 64  # channels of the generator at full size
    residual_blocks: int = 6  # on the volume
    motion_width: int = 32  # channels of keypoint detector and dense motion at full size
    motion_levels: int = 5  # halvings in both, beginning at a quarter of the picture's side
    compressed: int = 4  # volume channels that dense motion sees
    pose_width: int = 64  # channels of the pose estimator's stem
    spade_hidden: int = 128

    @property
    def multiple(self) -> int:
        """The sides of a picture are multiples of this, px."""
        return 4 << self.motion_levels


class _AppearanceEncoder(nn.Module):
    """Picture -> appearance volume at a quarter of its side (Wang et al., CVPR 2021, F)."""

    def __init__(self, config: FaceVid2VidConfig) -> None:
        super().__init__()
        width = config.width
        self.depth = config.depth
        self.stem = ConvBlock(3, width)
        self.down = nn.Sequential(DownBlock(width, 2 * width), DownBlock(2 * width, 4 * width))
        self.lift = nn.Conv2d(4 * width, config.feature_channels * config.depth, 1)
        self.residual = nn.Sequential(*(_VolumeBlock(config.feature_channels) for _ in range(config.residual_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.lift(self.down(self.stem(x)))
        return cast(Tensor, self.residual(flat.view(len(flat), -1, self.depth, *flat.shape[2:])))  # [B, C, D, H/4, W/4]


class _VolumeBlock(nn.Module):
    """Pre-activation residual block over a volume."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x).relu())
        return cast(Tensor, self.conv2(self.norm2(y).relu()) + x)


class _SpectralConv(nn.Module):
    """Convolution whose weight is divided by its largest singular value, left^T W right with the stored (not updated) singular vectors."""

    left: Tensor
    right: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = kernel // 2
        matrix = conv.weight.detach().flatten(1)
        right = nn.functional.normalize(matrix.sum(dim=0), dim=0)
        self.register_buffer("left", nn.functional.normalize(matrix @ right, dim=0))
        self.register_buffer("right", right)

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.dot(self.left, torch.mv(self.weight.flatten(1), self.right))
        return conv2d(x, self.weight / norm, self.bias, padding=self.padding)


class _Spade(nn.Module):
    """Instance norm, then scale and shift per place from a guide (Park et al., CVPR 2019, eq. 1)."""

    def __init__(self, channels: int, guide: int, hidden: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(guide, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        hidden = cast(Tensor, self.shared(interpolate(guide, x.shape[-2:]))).relu()
        return cast(Tensor, instance_norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden))


class _SpadeBlock(nn.Module):
    """SPADE residual block; its skip is learned where the number of channels changes."""

    def __init__(self, inputs: int, outputs: int, guide: int, hidden: int) -> None:
        super().__init__()
        middle = min(inputs, outputs)
        self.norm0 = _Spade(inputs, guide, hidden)
        self.conv0 = _SpectralConv(inputs, middle, 3)
        self.norm1 = _Spade(middle, guide, hidden)
        self.conv1 = _SpectralConv(middle, outputs, 3)
        self.norm_skip = _Spade(inputs, guide, hidden) if inputs != outputs else None
        self.conv_skip = _SpectralConv(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        y = self.conv0(leaky_relu(self.norm0(x, guide), 0.2))
        y = self.conv1(leaky_relu(self.norm1(y, guide), 0.2))
        if self.norm_skip is not None and self.conv_skip is not None:
            x = self.conv_skip(self.norm_skip(x, guide))
        return cast(Tensor, x + y)


class _SpadeDecoder(nn.Module):
    """Warped features -> picture of four times their side; the features are also every block's guide."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        guide = 4 * width
        self.enter = nn.Conv2d(guide, 8 * width, 3, padding=1)
        self.middle = nn.ModuleList(_SpadeBlock(8 * width, 8 * width, guide, hidden) for _ in range(6))
        self.up = nn.ModuleList([_SpadeBlock(8 * width, 4 * width, guide, hidden), _SpadeBlock(4 * width, width, guide, hidden)])
        self.to_rgb = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, guide: Tensor) -> Tensor:
        x: Tensor = self.enter(guide)
        for block in self.middle:
            x = block(x, guide)
        for block in self.up:
            x = block(interpolate(x, scale_factor=2.0), guide)
        return cast(Tensor, self.to_rgb(leaky_relu(x, 0.2))).sigmoid()


class _Generator(nn.Module):
    """The volume moved by dense motion, flattened, dimmed where the source shows nothing, and decoded (Wang et al., CVPR 2021, G)."""

    def __init__(self, config: FaceVid2VidConfig) -> None:
        super().__init__()
        channels, depth, width = config.feature_channels, config.depth, config.width
        self.appearance = _AppearanceEncoder(config)
        self.motion = DenseMotion(channels, depth, config.keypoints, config.motion_width, config.motion_levels, config.compressed)
        self.flatten = nn.Sequential(ConvBlock(channels * depth, 4 * width, slope=0.01), nn.Conv2d(4 * width, 4 * width, 1))
        self.decoder = _SpadeDecoder(width, config.spade_hidden)

    def forward(self, volume: Tensor, source: Tensor, driven: Tensor) -> Tensor:
        grid, visibility = self.motion(volume, source, driven)
        warped = grid_sample(volume, grid, align_corners=False)  # [B, C, D, H/4, W/4]
        return cast(Tensor, self.decoder(self.flatten(warped.flatten(1, 2)) * visibility))  # [B, 3, H, W]


class Source(NamedTuple):
    """What the networks know of source faces; made once for all frames that drive them."""

    volume: Tensor
    """(B, C, D, H/4, W/4) appearance"""
    canonical: Tensor
    """(B, K, 3) keypoints in neutral pose and expression"""
    keypoints: Tensor
    """(B, K, 3) keypoints as in the picture"""


class FaceVid2Vid(nn.Module):
    """Gives a source face the pose and expression of a driving face (Wang, Mallya and Liu, CVPR 2021), the G_r of E4S (section 3.1.1).

    Motion is absolute, as in E4S: the driven keypoints are the source's canonical ones under the driving face's pose and expression.
    """

    def __init__(self, config: FaceVid2VidConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FaceVid2VidConfig()
        self.generator = _Generator(config)
        self.detector = KeypointDetector(config.keypoints, config.motion_width, config.motion_levels, config.depth)
        self.estimator = MotionEstimator(config.keypoints, config.bins, config.pose_width)

    def forward(self, sources: Tensor, drivings: Tensor) -> Tensor:
        """Drive each source by the driving face beside it: RGB (B, 3, H, W) float32 [-1, 1] twice -> driven faces, likewise.

        H and W are multiples of 128; the checkpoint was trained at 256.
        """
        check_shape(drivings, "B 3 H W")
        check_shape(sources, " ".join(map(str, drivings.shape)))
        return self.drive(self.describe(sources), drivings)

    def describe(self, sources: Tensor) -> Source:
        """Appearance and keypoints of source faces: RGB (B, 3, H, W) float32 [-1, 1]."""
        pictures = self._pictures(sources)
        canonical = self.detector(pictures)
        return Source(self.generator.appearance(pictures), canonical, place_keypoints(canonical, self.estimator(pictures)))

    def drive(self, source: Source, drivings: Tensor) -> Tensor:
        """Drive described sources by faces RGB (B, 3, H, W) float32 [-1, 1] -> driven faces, likewise; one source may serve all B."""
        pictures = self._pictures(drivings)
        if len(source.volume) == 1:
            source = Source(*(part.expand(len(pictures), *part.shape[1:]) for part in source))
        check_shape(source.canonical, f"{len(pictures)} {self.config.keypoints} 3")
        driven = place_keypoints(source.canonical, self.estimator(pictures))
        return cast(Tensor, self.generator(source.volume, source.keypoints, driven)) * 2 - 1

    def estimate(self, faces: Tensor) -> HeadMotion:
        """Head pose and expression of faces: RGB (B, 3, H, W) float32 [-1, 1]."""
        return cast(HeadMotion, self.estimator(self._pictures(faces)))

    def _pictures(self, faces: Tensor) -> Tensor:
        """Faces [-1, 1] -> [0, 1], what the networks were trained on."""
        sizes = check_shape(faces, "B 3 H W")
        multiple = self.config.multiple
        if sizes["H"] % multiple or sizes["W"] % multiple:
            raise ValueError(f"expected faces whose sides are multiples of {multiple} px, got {sizes['W']} x {sizes['H']}")
        return (faces + 1) / 2


_RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        # Head pose: stage s of the ResNet is published as conv(s+1), norm(s+1) and block(2s-2), block(2s-1).
        (r"^he_estimator\.conv1\.", "estimator.stem.0."),
        (r"^he_estimator\.norm1\.", "estimator.stem.1."),
        *((rf"^he_estimator\.(conv|norm){stage + 2}\.", rf"estimator.stages.{stage}.0.\1.") for stage in range(4)),
        *((rf"^he_estimator\.block{2 * stage}\.", f"estimator.stages.{stage}.1.") for stage in (1, 2, 3)),
        *(
            (rf"^he_estimator\.block{2 * stage + 1}\.b\d_{index}\.", f"estimator.stages.{stage}.{index + (2 if stage else 1)}.")
            for stage in range(4)
            for index in range(5)
        ),
        (r"^(estimator\.stages\.\d\.\d)\.skip\.", r"\1.skip.0."),
        (r"^(estimator\.stages\.\d\.\d)\.norm4\.", r"\1.skip.1."),
        # The layer published as fc_roll gives the yaw and fc_yaw the roll: the published forward pass swaps them, and so it was trained.
        (r"^he_estimator\.fc_roll\.", "estimator.yaw."),
        (r"^he_estimator\.fc_yaw\.", "estimator.roll."),
        (r"^he_estimator\.fc_pitch\.", "estimator.pitch."),
        (r"^he_estimator\.fc_t\.", "estimator.translation."),
        (r"^he_estimator\.fc_exp\.", "estimator.expression."),
        # Canonical keypoints.
        (r"^kp_detector\.predictor\.down_blocks\.down", "detector.down."),
        (r"^kp_detector\.predictor\.up_blocks\.up", "detector.up."),
        (r"^kp_detector\.predictor\.conv\.", "detector.lift."),
        (r"^kp_detector\.kp\.", "detector.heatmaps."),
        (r"^kp_detector\.down\.weight$", "detector.blur"),
        # Generator.
        (r"^generator\.dense_motion_network\.", "generator.motion."),
        (r"^(generator\.motion\.hourglass)\.(?:encoder|decoder)\.(down|up)_blocks\.", r"\1.\2."),
        (r"^(generator\.motion\.hourglass)\.decoder\.(conv|norm)\.", r"\1.last.\2."),
        (r"^generator\.motion\.compress\.", "generator.motion.compress.conv."),
        (r"^generator\.motion\.norm\.", "generator.motion.compress.norm."),
        (r"^generator\.first\.", "generator.appearance.stem."),
        (r"^generator\.down_blocks\.", "generator.appearance.down."),
        (r"^generator\.second\.", "generator.appearance.lift."),
        (r"^generator\.resblocks_3d\.3dr", "generator.appearance.residual."),
        (r"^generator\.third\.", "generator.flatten.0."),
        (r"^generator\.fourth\.", "generator.flatten.1."),
        (r"^(generator\.decoder)\.fc\.", r"\1.enter."),
        (r"^(generator\.decoder)\.G_middle_", r"\1.middle."),
        (r"^(generator\.decoder)\.up_", r"\1.up."),
        (r"^(generator\.decoder)\.conv_img\.", r"\1.to_rgb."),
        (r"\.(conv|norm)_([01])\.", r".\1\2."),
        (r"\.(conv|norm)_s\.", r".\1_skip."),
        (r"\.mlp_shared\.0\.", ".shared."),
        (r"\.mlp_(gamma|beta)\.", r".\1."),
        (r"\.weight_orig$", ".weight"),
        (r"\.weight_u$", ".left"),
        (r"\.weight_v$", ".right"),
    )
)
"""(pattern, ours), applied in this order."""


def rename(key: str) -> str:
    """Published key, `part.key`, -> ours."""
    for pattern, ours in _RENAMES:
        key = pattern.sub(ours, key)
    return key


def _run_reference(module: nn.Module, case: Case) -> dict[str, Array]:
    """End to end from the two pictures."""
    reenactor = cast(FaceVid2Vid, module)
    source, driving = (_reference_picture(reenactor, case[name]) for name in ("source_u8", "driving_u8"))
    described = reenactor.describe(source)
    motions = {"source": reenactor.estimate(source), "driving": reenactor.estimate(driving)}
    outputs = {"kp_canonical": described.canonical, "kp_source": described.keypoints}
    outputs["kp_driving"] = place_keypoints(described.canonical, motions["driving"])
    for name, motion in motions.items():
        outputs |= {f"he_{name}_{angle}": getattr(motion, angle) for angle in ("yaw", "pitch", "roll")}
        outputs |= {f"he_{name}_t": motion.translation, f"he_{name}_exp": motion.expression.flatten(1)}
    outputs["prediction_sub"] = (reenactor.drive(described, driving)[:, :, ::2, ::2] + 1) / 2
    return {name: value.numpy() for name, value in outputs.items()}


def _run_from_keypoints(module: nn.Module, case: Case) -> Array:
    """`prediction_sub` from the source picture and the stored keypoints."""
    reenactor = cast(FaceVid2Vid, module)
    source = _reference_picture(reenactor, case["source_u8"])
    at_source, driven = (torch.from_numpy(case[name]).to(source) for name in ("kp_source", "kp_driving"))
    driven_face: Tensor = reenactor.generator(reenactor.generator.appearance((source + 1) / 2), at_source, driven)
    prediction: Array = driven_face[:, :, ::2, ::2].numpy()
    return prediction


def _reference_picture(reenactor: FaceVid2Vid, picture: Array) -> Tensor:
    """RGB (H, W, 3) uint8 -> (1, 3, H, W) [-1, 1] in the networks' precision."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].to(reenactor.detector.blur.dtype) / 127.5 - 1


PUBLISHED_FACEVID2VID = Published(
    name="facevid2vid",
    file="faceVid2Vid/00000189-checkpoint.pth.tar",
    parts=("generator", "kp_detector", "he_estimator"),
    build=lambda: FaceVid2Vid().eval(),
    rename=rename,
    run=_run_reference,
    # Under the reference's random weights rounding of the keypoints (1e-6 of the largest) moves the picture by about 1e-3, ten times the
    # usual limit; the reference itself lies 3e-4 and 7e-4 from a float64 run. From the stored keypoints ours agrees to 6e-5.
    amplified=(Amplified(output="prediction_sub", given=("kp_source", "kp_driving"), run=_run_from_keypoints),),
)
