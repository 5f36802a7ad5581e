"""Training of the 128 px head: features of the generator's middle against the finished picture, shrunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e4s_models.preview_head import LAYERS, SIDE, PreviewHead
from flows.training.data import read_shard
from flows.training.objective import save

if TYPE_CHECKING:
    from e4s_models.mobile_stylegan import MobileStyleGAN

_SHARDS = 15  # of pictures to learn from: their features take 70 MB each
_CROP = 64  # px of the crop that is kept of each feature map
_BATCH = 8


def fit(
    data: Path,
    out: Path,
    generator: MobileStyleGAN,
    steps: int,
    seed: int,
    validation: int,
    report: Callable[[str], None] = print,
) -> PreviewHead:
    """Fit the head to the shards after the first `validation` ones, which judge it; writes `out`, and does nothing if it is complete."""
    torch.manual_seed(seed)
    head = PreviewHead()
    head.mean_code.copy_(generator.mean_w)
    if out.is_file():
        head.load_state_dict(torch.load(out, weights_only=True))
        return head
    paths = sorted(data.glob("shard-*.npz"))
    features, codes, regions, colours = _examples(generator, paths[validation : validation + _SHARDS], seed)
    held_out = _examples(generator, paths[:1], seed)
    head.fit_direct(features[::8].float(), colours[::8])
    styles = [p for name, p in head.named_parameters() if "style" in name]
    others = [p for name, p in head.named_parameters() if "style" not in name]
    rates = [1.5e-4, 1.5e-3]
    optimizer = torch.optim.AdamW([{"params": styles}, {"params": others}], lr=rates[1], weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.15)
    rng = np.random.Generator(np.random.PCG64([seed, 2]))
    for step in range(1, steps + 1):
        index = torch.from_numpy(rng.choice(len(features), _BATCH))
        made = head.colours_of(features[index].float(), codes[index].float(), regions[index])
        loss = F.mse_loss(made, colours[index])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            report(f"preview head: step {step}, {_psnr(head, *held_out):.2f} dB on held-out pictures")
    save(head.state_dict(), out)
    return head.eval()


def _examples(generator: MobileStyleGAN, paths: list[Path], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features float16 (N, C, 64, 64), late codes float16 (N, 12, 6, 512), region ids (N, 64, 64) and colours (N, 3, 64, 64) of crops."""
    rng = np.random.Generator(np.random.PCG64([seed, 3]))
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for path in paths:
        shard = read_shard(path)
        for image, labels, regional in zip(shard.images, shard.labels, shard.regional_codes(), strict=True):
            codes, ids = torch.from_numpy(regional)[None], torch.from_numpy(labels)[None]
            with torch.no_grad():
                features = generator.synthesize(codes, ids, stop_after=SIDE)
            picture = F.avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None].float(), image.shape[0] // SIDE) / 127.5 - 1
            top, left = rng.integers(0, SIDE - _CROP + 1, 2)
            window = (..., slice(top, top + _CROP), slice(left, left + _CROP))
            small = ids[:, :: ids.shape[1] // SIDE, :: ids.shape[2] // SIDE]
            found.append((features[window].half(), codes[:, :, list(LAYERS)].half(), small[window], picture[window]))
    features, codes, regions, colours = (torch.cat(part) for part in zip(*found, strict=True))
    return features, codes, regions, colours


def _psnr(head: PreviewHead, features: Tensor, codes: Tensor, regions: Tensor, colours: Tensor) -> float:
    """Mean PSNR over pictures, dB."""
    with torch.inference_mode():
        made = torch.cat(
            [head.colours_of(features[k : k + 1].float(), codes[k : k + 1].float(), regions[k : k + 1]) for k in range(len(codes))]
        )
        return float((10 * torch.log10(4 / (made - colours).square().mean(dim=(1, 2, 3)))).mean())
