"""Real-ESRGAN x4plus (RRDBNet, 23 blocks) in ncnn form: general super-resolution by four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from e4s_models.checks import check_shape

UInt8 = npt.NDArray[np.uint8]

SCALE = 4


def _import_ncnn() -> Any:
    try:
        import ncnn
    except ImportError:
        raise RuntimeError("the backend realesrgan needs the package ncnn: pip install 'e4s[realesrgan]'") from None
    return ncnn


class RealESRGAN:
    """The published network `realesrgan-x4plus`, run by ncnn on the CPU. One instance must not be used by two threads at once."""

    def __init__(self, param: Path, binary: Path, threads: int = 1) -> None:
        """Open the network. Raises RuntimeError if the optional package is missing or the files do not fit."""
        self._ncnn = _import_ncnn()
        self._net = self._ncnn.Net()
        self._net.opt.use_vulkan_compute = False
        self._net.opt.num_threads = threads
        if self._net.load_param(str(param)) or self._net.load_model(str(binary)):
            raise RuntimeError(f"ncnn cannot read {param} and {binary}; fetch the weights realesrgan_param and realesrgan_bin again")

    @classmethod
    def load(cls) -> RealESRGAN:
        """Open the verified weights `realesrgan_param` and `realesrgan_bin`."""
        from e4s_models.weights import weight_path

        _import_ncnn()  # said before any weights are asked for
        return cls(weight_path("realesrgan_param"), weight_path("realesrgan_bin"))

    def upscale(self, image: UInt8) -> UInt8:
        """Enlarge RGB (H, W, 3) uint8 to (4 H, 4 W, 3). Time and memory grow with H x W: keep it at 256 px or below."""
        check_shape(image, "H W 3")
        planes = np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / np.float32(255)  # [3, H, W]
        with self._net.create_extractor() as extractor:
            extractor.input("data", self._ncnn.Mat(planes))
            status, output = extractor.extract("output")
        if status:
            raise RuntimeError(f"Real-ESRGAN failed on a picture of {image.shape[1]}x{image.shape[0]} px: choose a smaller enhance.side")
        large = np.array(output).transpose(1, 2, 0)  # [4H, 4W, 3]
        return np.asarray(np.clip(np.rint(large * 255), 0, 255), np.uint8)
