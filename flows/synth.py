"""Synthetic people to try everything on, without anybody's consent at stake: pictures, pairs and a moving, sounding clip.

The same arguments give the same bytes (on one kind of machine), whatever was there before.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from e4s_models.weights import weight_digest
from flows.manifests import distinct_pairs
from flows.tables import row_id
from storage.parquet import read_parquet
from storage.store import write_atomic
from tasks.encode import GENERATOR, GENERATOR_WEIGHT, MANIFEST, W_DIGEST, w_digest
from tasks.stage import Float32, UInt8

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN

Progress = Callable[[int, int], None]
"""Called with (done, all) after every picture or frame."""

PAIRS = "pairs.parquet"
_PUBLISH_EVERY = 32  # people; what an interruption can cost
_SCHEMA = pa.schema(
    {
        "file": pa.string(),  # relative to the manifest's folder
        "sha256": pa.string(),  # of the PNG's bytes
        "seed": pa.int64(),  # the person's own
        "truncation": pa.float64(),
        "size": pa.int32(),  # px
        "consent": pa.string(),
        "mapping_sha256": pa.string(),  # constants of the mapping network
        "synthesis_sha256": pa.string(),  # constants of the synthesis network
        "w": pa.list_(pa.float32(), 512),  # style code, truncated
        "w_sha256": pa.string(),
    }
)
Row = dict[str, Any]


def make_people(
    count: int,
    seed: int,
    out: str | Path,
    *,
    truncation: float = 0.7,
    pairs: int = 0,
    size: int = 1024,
    progress: Progress | None = None,
) -> Path:
    """Make people `out/people/000000.png`, ... and their manifest `out/people.parquet`; returns the manifest's path.

    Person k has the seed `seed + k`, whatever `count` is, so a folder can grow: a picture that its manifest row describes and whose
    digest matches is not made again. With `pairs`, `out/pairs.parquet` names that many ordered pairs (columns id, source, target; drawn
    by `draw_pairs`).

    Args:
        truncation: pulls codes towards the mean face, in (0, 1.5]; 1 = the generator's full variety.
        size: px of a side, 64 to 1024; below 1024 the picture is shrunk.

    Raises ValueError on arguments out of range and when `out` holds other people already.
    """
    _check_person(seed, truncation, size)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= pairs <= count * (count - 1):
        raise ValueError(f"pairs must be 0 to {count * (count - 1)} with {count} people, got {pairs}: make more people with count")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the people")
    if any(parent.is_file() for parent in folder.absolute().parents):
        raise ValueError(f"{folder} lies below a file: give a folder for the people")

    manifest = folder / MANIFEST
    rows = _rows(manifest)
    generator: MobileStyleGAN | None = None
    for index in range(count):
        row = _facts(index, seed, truncation, size)
        known = rows.get(row["file"])
        if known and any(known[name] != value for name, value in row.items()):
            raise ValueError(f"{manifest} holds other people (seed, truncation, size or generator differ): give another folder")
        path = folder / row["file"]
        if not known or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known["sha256"]:
            generator = generator or _generator()
            w = person_w(generator, seed + index, truncation)
            row |= {"w": w, "w_sha256": w_digest(w)}
            png = _png(_shrink(picture(generator, w), size), row)
            write_atomic(path, png)
            rows[row["file"]] = row | {"sha256": hashlib.sha256(png).hexdigest()}
            if index % _PUBLISH_EVERY == _PUBLISH_EVERY - 1:
                _publish(manifest, rows)
        if progress:
            progress(index + 1, count)
    _publish(manifest, rows)
    if pairs:
        files = [_file(index) for index in range(count)]
        drawn = draw_pairs(count, pairs, seed)
        table = {
            "id": [row_id(row) for row in range(pairs)],
            "source": [files[source] for source, _ in drawn],
            "target": [files[target] for _, target in drawn],
        }
        write_atomic(folder / PAIRS, _parquet(pa.table(table)))
    return manifest


def draw_pairs(count: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """Different ordered pairs (source, target) of `count` people, none with itself, decided by `seed`.

    No source and no target twice where there are people enough (`distinct_pairs`); else a draw without replacement from all pairs, by
    NumPy's PCG64: number n of the count * (count - 1) has source n // (count - 1); its target is n % (count - 1), skipping the source.
    """
    if pairs <= count:
        return distinct_pairs(count, pairs, seed)
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(count * (count - 1), pairs, replace=False)
    split = (divmod(int(number), count - 1) for number in drawn)
    return [(source, target + (target >= source)) for source, target in split]


def person_w(generator: MobileStyleGAN, seed: int, truncation: float) -> Float32:
    """Style code (512,) of the person with this seed: 512 normal numbers of NumPy's PCG64, mapped, then truncated."""
    import torch

    z = np.random.Generator(np.random.PCG64(seed)).standard_normal((1, 512), np.float32)
    with torch.inference_mode():
        mean = generator.mean_w
        w: Float32 = (mean + truncation * (generator.map(torch.from_numpy(z))[0] - mean)).numpy()
    return w


def picture(generator: MobileStyleGAN, codes: Float32) -> UInt8:
    """Style code (512,), or one per style layer (23, 512) -> RGB (1024, 1024, 3) uint8."""
    import torch

    with torch.inference_mode():
        rgb = generator.synthesize(torch.from_numpy(codes).expand(1, generator.num_layers, -1))[0].permute(1, 2, 0)
        return rgb.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()


def make_clip(
    seed: int,
    out: str | Path,
    *,
    seconds: float = 3.0,
    fps: int = 25,
    size: int = 512,
    truncation: float = 0.7,
    progress: Progress | None = None,
) -> Path:
    """Make a clip of one person who turns the head and changes expression along a closed path, with a soundtrack; returns `out`.

    MP4, H.264 yuv420p and AAC mono 48 kHz of the same length; no times or tool names in it. `size` is the side in px, even, 64 to 1024.
    Raises ValueError on arguments out of range.
    """
    _check_person(seed, truncation, size)
    path = Path(out)
    if path.suffix.lower() != ".mp4" or path.is_dir():
        raise ValueError(f"{path}: give the name of an .mp4 file for the clip")
    if size % 2:
        raise ValueError(f"size must be even for a clip, got {size}")
    if not 1 <= fps <= 120:
        raise ValueError(f"fps must be 1 to 120, got {fps}")
    frames = round(seconds * fps) if math.isfinite(seconds) else 0
    if frames < 1:
        raise ValueError(f"seconds must be long enough for one frame, got {seconds:g}")
    generator = _generator()
    w = person_w(generator, seed, truncation)
    yaw, expression = _motions(generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def moving() -> Iterator[UInt8]:
        for frame in range(frames):
            angle = 2 * math.pi * frame / frames
            codes = np.tile(w, (generator.num_layers, 1))
            codes[:_MOTION_LAYERS] += np.float32(math.sin(angle)) * yaw + np.float32(math.sin(2 * angle)) * expression
            yield _shrink(picture(generator, codes), size)
            if progress:
                progress(frame + 1, frames)

    try:
        write_mp4(temporary, moving(), frames, fps, size)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


_MOTION_LAYERS = 5  # style layers up to 8 px: pose and large shapes, not the person's features
_YAW, _EXPRESSION = (1, 0.6), (4, 0.8)  # principal component of W and amplitude in its standard deviations; chosen by looking


def _motions(generator: MobileStyleGAN) -> tuple[Float32, Float32]:
    """Directions (512,) in W that turn the head and change the expression."""
    import torch

    z = np.random.Generator(np.random.PCG64(1)).standard_normal((4096, 512), np.float32)
    with torch.inference_mode():
        w = generator.map(torch.from_numpy(z)).double().numpy()
    variances, components = np.linalg.eigh(np.cov(w, rowvar=False))  # ascending
    found = []
    for index, amplitude in (_YAW, _EXPRESSION):
        component = components[:, -1 - index]
        component = component * np.sign(component[np.abs(component).argmax()])  # its sign is arbitrary
        found.append((component * amplitude * math.sqrt(variances[-1 - index])).astype(np.float32))
    return found[0], found[1]


def write_mp4(path: Path, pictures: Iterator[UInt8], frames: int, fps: int, size: int) -> None:
    """A clip of square pictures with a soundtrack, encoded with one thread and without tags: the same pictures give the same bytes."""
    import av

    rate, block = 48000, 1024  # Hz; samples per AAC frame
    exact = {"flags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast", "threads": "1", **exact})
        video.width, video.height, video.pix_fmt = size, size, "yuv420p"
        audio = container.add_stream("aac", rate=rate, layout="mono", options={"threads": "1", **exact})
        samples = _soundtrack(round(rate * frames / fps), rate)
        heard = 0
        for index, rgb in enumerate(pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
            until = len(samples) if index == frames - 1 else round(rate * (index + 1) / fps)
            while heard < until:
                part = samples[heard : heard + block]
                sound = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
                sound.sample_rate, sound.pts = rate, heard
                container.mux(audio.encode(sound))
                heard += len(part)
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def _soundtrack(length: int, rate: int) -> Float32:
    """A quiet tone that rises and falls once a second, (length,) in [-1, 1]: audible, and its drift would be, too."""
    t = np.arange(length) / rate
    return (0.1 * np.sin(2 * np.pi * 220 * t) * (0.6 - 0.4 * np.cos(2 * np.pi * t))).astype(np.float32)


def _check_person(seed: int, truncation: float, size: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if not 0 < truncation <= 1.5:
        raise ValueError(f"truncation must be above 0 and at most 1.5, got {truncation:g}")
    if not 64 <= size <= 1024:
        raise ValueError(f"size must be 64 to 1024 px, got {size}")


def _generator() -> MobileStyleGAN:
    from e4s_models.mobile_stylegan import MobileStyleGAN

    return MobileStyleGAN.load()


def _file(index: int) -> str:
    return f"people/{index:06d}.png"


def _facts(index: int, seed: int, truncation: float, size: int) -> Row:
    """What decides a person, known before it is made."""
    return {
        "file": _file(index),
        "seed": seed + index,
        "truncation": truncation,
        "size": size,
        "consent": "synthetic",
        "mapping_sha256": weight_digest("mobile_stylegan_mapping_bin"),
        "synthesis_sha256": weight_digest(GENERATOR_WEIGHT),
    }


def _rows(manifest: Path) -> dict[str, Row]:
    """Rows of an earlier call by file; none where the manifest is missing, damaged or not one of ours."""
    try:
        table = read_parquet(manifest)
    except (pa.ArrowException, OSError):
        return {}
    return {row["file"]: row for row in table.to_pylist()} if table.schema.equals(_SCHEMA) else {}


def _publish(manifest: Path, rows: dict[str, Row]) -> None:
    ordered = [rows[file] for file in sorted(rows)]
    write_atomic(manifest, _parquet(pa.Table.from_pylist(ordered, schema=_SCHEMA)))


def _parquet(table: pa.Table) -> bytes:
    data = io.BytesIO()
    pq.write_table(table, data)
    return data.getvalue()


def _shrink(rgb: UInt8, size: int) -> UInt8:
    return rgb if rgb.shape[0] == size else cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _png(rgb: UInt8, row: Row) -> bytes:
    """PNG with its origin as text chunks."""
    text = PngInfo()
    for key, value in (
        ("e4s:seed", row["seed"]),
        ("e4s:truncation", f"{row['truncation']:g}"),
        (W_DIGEST, row["w_sha256"]),
        ("e4s:consent", row["consent"]),
        (GENERATOR, row["synthesis_sha256"]),
    ):
        text.add_text(key, str(value))
    data = io.BytesIO()
    Image.fromarray(rgb).save(data, "PNG", pnginfo=text, compress_level=3)
    return data.getvalue()
