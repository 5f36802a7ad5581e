"""Which properties of a target picture its result keeps: `python -m benchmarks.image_properties` prints the table of docs/images.md.

Every cell comes from a real file that is written here, read as a target, and compared with what its result says.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from storage.codec import encode_png
from tasks.color_profile import cicp_profile
from tasks.frame import ImageFile, hash_file
from tasks.properties import read_properties, with_properties
from tasks.stage import ItemError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "BMP", "GIF", "JPEG2000", "PPM")
PROPERTIES = ("pixels outside of the mask", "colour profile", "EXIF", "density", "transparency")
_KEPT, _LOST, _NONE = "kept", "lost", "-"


def _said(data: bytes) -> dict[str, Any]:
    """What a file says, by property; None for what it does not say."""
    with Image.open(io.BytesIO(data)) as image:
        dpi = image.info.get("dpi")
        return {
            "colour profile": image.info.get("icc_profile"),
            "EXIF": image.getexif().get(ExifTags.Base.Artist),
            "density": dpi and round(float(dpi[0])),
            "transparency": True if image.has_transparency_data else None,
        }


def check_format(kind: str, folder: Path) -> dict[str, str]:
    """Write a picture with all properties that the format has room for; returns property -> kept, lost or -."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] |= 128
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "A. Person"
    options: dict[str, Any] = {"icc_profile": cicp_profile(bytes((12, 13, 0, 1))), "exif": exif, "dpi": (300, 300)}
    buffer = io.BytesIO()
    opaque = kind in ("JPEG", "BMP", "GIF", "PPM")
    Image.fromarray(pixels[..., :3] if opaque else pixels).save(buffer, kind, **options)
    path = folder / kind
    path.write_bytes(buffer.getvalue())
    file = ImageFile(str(path), hash_file(str(path)))
    frame = file.read()
    bare = frame.pixels if frame.alpha is None else np.dstack((frame.pixels, frame.alpha))
    result = with_properties(encode_png(bare), read_properties(file))
    path.with_suffix(".png").write_bytes(result)
    before, after = _said(buffer.getvalue()), _said(result)
    with Image.open(io.BytesIO(buffer.getvalue())) as image, Image.open(io.BytesIO(result)) as again:
        mode = "RGB" if frame.alpha is None else "RGBA"
        same = np.array_equal(np.asarray(image.convert(mode)), np.asarray(again.convert(mode)))
    cells = {name: _NONE if before[name] is None else _KEPT if before[name] == after[name] else _LOST for name in before}
    return {"pixels outside of the mask": _KEPT if same else _LOST, **cells}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        print(f"| target | {' | '.join(PROPERTIES)} |")
        print(f"|---|{'---|' * len(PROPERTIES)}")
        lost = 0
        for kind in FORMATS:
            try:
                cells = check_format(kind, Path(folder))
            except ItemError as error:
                print(f"| {kind} | {error} |")
                lost += 1
                continue
            lost += _LOST in cells.values()
            print(f"| {kind} | {' | '.join(cells[name] for name in PROPERTIES)} |")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
