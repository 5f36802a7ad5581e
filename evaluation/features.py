"""Feature networks: which network reads which crop of an aligned face, and what comes out. Features are what the store caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from e4s_models.dlib_face import FaceDetector

Kind = Literal["identity", "pose", "expression", "inception", "pixels", "lpips", "skin", "answer", "answer_lpips"]
Float32 = npt.NDArray[np.float32]

MIN_PRESENCE = 0.5  # the landmark network's own probability that there is a face


@dataclass(frozen=True)
class Extracted:
    """Features of a batch, and why some faces have none."""

    features: Float32  # (B, D); a failed row is zero
    failures: Mapping[int, str] = field(default_factory=dict)  # row -> reason


Extract = Callable[["torch.Tensor", "torch.Tensor | None"], Extracted]
"""FFHQ-aligned faces RGB (B, 3, H, H) float32 [-1, 1], landmarks (B, 68, 2) px of them or None for the mean ones -> features."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """One network under one input convention, as data."""

    name: str
    kind: Kind
    weight: str  # registry name, or that of a network which the user adds; "" where nothing is learnt
    side: int  # px that the network reads
    crop: str
    dimensions: int = 0
    load: Callable[[str], Extract] | None = None  # device -> extractor; None for what compares two pictures at once
    role: str = ""  # of a file that the user adds (`e4s_models.user_network`); it stands for `weight`
    version: int = 1  # raise it whenever the features change for the same weights
    device: Literal["cpu", "any"] = "any"
    libraries: tuple[str, ...] = ("numpy", "torch")  # distributions that decide the features

    @property
    def sha256(self) -> str:
        """Of the weights; "" if there are none, or none yet."""
        from e4s_models.weights import WeightsError, weight_digest

        if self.role:
            from e4s_models.user_network import require_user_network

            try:
                return require_user_network(self.role)[0]
            except WeightsError:
                return ""
        return weight_digest(self.weight) if self.weight else ""

    def missing(self) -> str:
        """ "" if the network can be run here, else a sentence that says what to do."""
        from e4s_models.weights import WeightsError, weight_path

        try:
            if self.role:
                _check_user_network(self)
            elif self.weight:
                weight_path(self.weight)
        except WeightsError as error:
            return str(error)
        return ""

    def convention(self) -> dict[str, Any]:
        """What the user declared of the file, as plain data; {} for our own networks."""
        from e4s_models.user_network import user_convention

        return asdict(user_convention(self.role)) if self.role else {}

    @property
    def resolution(self) -> str:
        """What the network reads, as text."""
        declared = self.convention()
        width, height = (declared["width"], declared["height"]) if declared else (self.side, self.side)
        return f"{width} px" if width == height else f"{width} x {height} px"


OFF_CENTRE = 0.2  # of the crop's side: a find farther than this from where an aligned face lies is another face, or none


def find_landmarks(detector: FaceDetector, faces: torch.Tensor) -> Extracted:
    """The 68 landmarks that identity crops need, found in the very pictures: RGB (B, 3, H, H) [-1, 1] -> (B, 136) px, x and y in turn.

    Fails where no face is found in the middle of the crop: in a swapped face that is a result worth counting.
    """
    from e4s_models.face_crops import as_pixels, default_landmarks

    middles = default_landmarks(faces).mean(1).cpu().numpy()  # (B, 2)
    features, failures = np.zeros((len(faces), 136), np.float32), {}
    for row, picture in enumerate(as_pixels(faces)):
        points = [face.landmarks for face in detector.detect(picture)]
        near = [found for found in points if np.hypot(*(found.mean(0) - middles[row])) < OFF_CENTRE * len(picture)]
        if near:
            features[row] = near[0].reshape(-1)
        else:
            failures[row] = "no face found by the landmark detector"
    return Extracted(features, failures)


def _identity(name: str) -> Callable[[str], Extract]:
    def load(device: str) -> Extract:
        from e4s_models.id_networks import ID_NETWORKS

        network = ID_NETWORKS[name](device)
        return lambda faces, landmarks: Extracted(_array(network.features(faces, landmarks)))

    return load


def _head_pose(device: str) -> Extract:
    from e4s_models.head_pose import HeadPose

    network = HeadPose.load().to(device)
    return lambda faces, landmarks: Extracted(_array(network.degrees(faces)))


def _hopenet(device: str) -> Extract:
    import torch

    from e4s_models.added import load_added
    from e4s_models.face_crops import loose_squares
    from e4s_models.hopenet import HopeNet
    from e4s_models.onnx_network import in_batches_of_one_on_cpu

    network = load_added("hopenet", device)
    if not isinstance(network, HopeNet):
        raise TypeError(f"expected a HopeNet under the name hopenet, got {type(network).__name__}")

    @torch.inference_mode()
    def extract(faces: torch.Tensor, landmarks: torch.Tensor | None) -> Extracted:
        return Extracted(_array(in_batches_of_one_on_cpu(network.degrees, loose_squares(faces, 224))))

    return extract


def _blendshapes(device: str) -> Extract:
    from e4s_models.face_crops import as_pixels
    from e4s_models.face_mesh import NUM_BLENDSHAPES, FaceMesh

    mesh = FaceMesh.load()

    def extract(faces: torch.Tensor, landmarks: torch.Tensor | None) -> Extracted:
        features, failures = np.zeros((len(faces), NUM_BLENDSHAPES), np.float32), {}
        for row, face in enumerate(as_pixels(faces)):
            points, presence = mesh.landmarks(face)
            if presence < MIN_PRESENCE:
                failures[row] = "no face found by the landmark network"
            else:
                features[row] = mesh.blendshapes(points, face.shape[0])
        return Extracted(features, failures)

    return extract


def _inception(device: str) -> Extract:
    from e4s_models.inception_fid import InceptionFid

    network = InceptionFid.load(device)
    return lambda faces, landmarks: Extracted(_array(network.features(faces)))


def _check_user_network(network: FeatureNetwork) -> None:
    """Raise WeightsError unless the user's file is here, unchanged, and wants and gives what we can serve and read."""
    from e4s_models.user_network import ROLES, require_user_network, user_convention
    from e4s_models.weights import WeightsError

    require_user_network(network.role)
    declared, own = user_convention(network.role), ROLES[network.role]
    if declared.crop != own.crop:
        raise WeightsError(
            f"{network.role} was added with the crop {declared.crop!r}, which cannot be cut here: faces are cut as {own.crop!r}; "
            f"if that is what it wants, take `crop` out of its convention and run `e4s models add --network {network.role} --file FILE`"
        )
    if network.name == "deep3d" and declared.dimensions not in (own.dimensions, network.dimensions):
        raise WeightsError(
            f"{network.role} was added with {declared.dimensions} numbers per face; expected the {own.dimensions} coefficients, "
            f"or the {network.dimensions} of the expression alone"
        )


def _user(role: str, part: slice = slice(None)) -> Callable[[str], Extract]:
    """A file that the user added; `part` of its output, where it gives all that its published network gives."""

    def load(device: str) -> Extract:
        from e4s_models.user_crops import user_squares
        from e4s_models.user_network import ROLES, load_user_network

        network = load_user_network(role)
        declared = network.convention
        used = part if declared.dimensions == ROLES[role].dimensions else slice(None)

        def extract(faces: torch.Tensor, landmarks: torch.Tensor | None) -> Extracted:
            squares = user_squares(role, faces, landmarks, declared.height, declared.width)
            return Extracted(network(squares)[:, used])

        return extract

    return load


def _array(features: Any) -> Float32:
    values: Float32 = features.float().cpu().numpy()
    return values


DEEP3D_EXPRESSION = slice(80, 144)  # of the 257 coefficients: behind 80 of identity, before 80 of texture

_TEMPLATE_CROP = "ArcFace's 112 px template by five points of dlib's 68 landmarks of that picture"
_LOOSE_CROP = "square of 0.84 of the aligned crop, from (0.08, 0.12)"
_ANSWER_CROP = "the aligned crop of the true picture, inside the convex hull of its 68 landmarks"

NETWORKS: Mapping[str, FeatureNetwork] = {
    network.name: network
    for network in (
        FeatureNetwork(
            name="arcface_mbf",
            kind="identity",
            weight="arcface_mbf",
            side=112,
            crop=_TEMPLATE_CROP,
            dimensions=512,
            load=_identity("arcface_mbf"),
        ),
        FeatureNetwork(
            name="sface", kind="identity", weight="sface", side=112, crop=_TEMPLATE_CROP, dimensions=128, load=_identity("sface")
        ),
        FeatureNetwork(
            name="dlib_face_id",
            kind="identity",
            weight="dlib_face_id",
            side=150,
            crop="dlib's face chip, padding 0.25, by its 68 landmarks of that picture",
            dimensions=128,
            load=_identity("dlib_face_id"),
            device="cpu",
            libraries=("numpy", "torch", "dlib-bin"),
        ),
        FeatureNetwork(
            name="cosface",
            kind="identity",
            weight="",
            role="cosface",
            side=112,
            crop=_TEMPLATE_CROP,
            dimensions=512,
            load=_user("cosface"),
            device="cpu",
        ),
        FeatureNetwork(
            name="6drepnet360",
            kind="pose",
            weight="head_pose_6drepnet",
            side=224,
            crop=_LOOSE_CROP,
            dimensions=3,
            load=_head_pose,
        ),
        FeatureNetwork(name="hopenet", kind="pose", weight="hopenet", side=224, crop=_LOOSE_CROP, dimensions=3, load=_hopenet),
        FeatureNetwork(
            name="blendshapes",
            kind="expression",
            weight="face_mesh",
            side=256,
            crop="upright square of 1.5 times the box of the face mesh's points",
            dimensions=52,
            load=_blendshapes,
            device="cpu",
            libraries=("numpy", "torch", "opencv-python-headless", "ai-edge-litert"),
        ),
        FeatureNetwork(
            name="deep3d",
            kind="expression",
            weight="",
            role="deep3d",
            side=224,
            crop="as Deep3DFaceRecon aligns: five points of dlib's 68 landmarks of that picture to the mean face's; coefficients 80 to 143",
            dimensions=64,
            load=_user("deep3d", DEEP3D_EXPRESSION),
            device="cpu",
        ),
        FeatureNetwork(
            name="inception_fid_helper",
            kind="inception",
            weight="fid_inception",
            side=299,
            crop="the whole aligned crop, shrunk bilinearly with antialiasing",
            dimensions=2048,
            load=_inception,
        ),
        FeatureNetwork(
            name="inception_standard",
            kind="inception",
            weight="",
            role="inception",
            side=299,
            crop="the whole aligned crop, shrunk bilinearly with antialiasing",
            dimensions=2048,
            load=_user("inception"),
            device="cpu",
        ),
        FeatureNetwork(name="pixels", kind="pixels", weight="", side=1024, crop="the whole aligned crop"),
        FeatureNetwork(name="lpips_alexnet", kind="lpips", weight="lpips_alexnet", side=1024, crop="the whole aligned crop"),
        FeatureNetwork(
            name="skin_chroma",
            kind="skin",
            weight="",
            side=256,
            crop="skin of the aligned crops of result and target, each by its own label map, without a rim of 2 px",
        ),
        FeatureNetwork(name="pixels_in_face", kind="answer", weight="", side=1024, crop=_ANSWER_CROP),
        FeatureNetwork(name="lpips_alexnet_in_face", kind="answer_lpips", weight="lpips_alexnet", side=256, crop=_ANSWER_CROP),
    )
}
