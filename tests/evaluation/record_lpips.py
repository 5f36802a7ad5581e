"""Records what the `lpips` package computes, for test_lpips: `python tests/evaluation/record_lpips.py FOLDER`.

FOLDER holds the unpacked wheel lpips==0.1.4. Its own code runs, with its own linear heads and constants; only torchvision, which it imports
for the AlexNet trunk, is replaced by the same layers with the same ImageNet weights, since torchvision's wheel needs CUDA.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn

from e4s_models.weights import load_numpy_pickle, weight_path

RECORDED = Path(__file__).parents[1] / "data" / "lpips.npz"
SHAPES = ((64, 64), (96, 80), (200, 256))  # height, width


def pictures(height: int, width: int) -> torch.Tensor:
    """Two RGB pictures (2, 3, H, W) float32 [0, 1], smooth and noisy, equal on every machine."""
    random = np.random.Generator(np.random.PCG64(height * width))
    smooth = torch.from_numpy(random.random((2, 3, height // 8, width // 8), np.float32))
    noise = torch.from_numpy(random.random((2, 3, height, width), np.float32))
    return 0.7 * smooth.repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.3 * noise


def alexnet(**_: object) -> SimpleNamespace:
    convolutions = [
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1),
    ]
    arrays = load_numpy_pickle(weight_path("lpips_alexnet"))["AlexNet_0"]
    for index, convolution in enumerate(convolutions):
        convolution.weight.data = torch.from_numpy(arrays[f"Conv_{index}"]["kernel"].transpose(3, 2, 0, 1).copy())
        convolution.bias.data = torch.from_numpy(arrays[f"Conv_{index}"]["bias"])
    layers: list[nn.Module] = []
    for index, convolution in enumerate(convolutions):
        layers += [convolution, nn.ReLU()]
        if index in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
    return SimpleNamespace(features=nn.Sequential(*layers))


def main(folder: str) -> None:
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    models.alexnet = alexnet  # type: ignore[attr-defined]
    torchvision.models = models  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": torchvision, "torchvision.models": models}
    sys.path.insert(0, folder)
    import lpips

    recorded = {}
    with torch.inference_mode():
        for spatial in (False, True):
            network = lpips.LPIPS(net="alex", spatial=spatial, verbose=False)
            for height, width in SHAPES:
                first, second = pictures(height, width)[:, None] * 2 - 1
                value = network(first, second)[0, 0].numpy()
                recorded[f"{'map' if spatial else 'value'}_{height}x{width}"] = value[3::16, 5::16] if spatial else value[0, 0]
    np.savez_compressed(RECORDED, **recorded)


if __name__ == "__main__":
    main(sys.argv[1])
