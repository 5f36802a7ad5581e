"""On a GPU: the same pipeline, results close to the CPU's (run with `-m gpu` where there is one)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flows.engine import execute
from flows.plan import Request, make_plan
from flows.progress import Lines
from storage.codec import decode_png
from storage.run import RunFolder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_generator_on_the_gpu_is_close_to_the_cpu() -> None:
    from e4s_models.mobile_stylegan import MobileStyleGAN

    cpu, gpu = MobileStyleGAN.load("cpu"), MobileStyleGAN.load("cuda")
    codes = cpu.mean_w.expand(1, 12, cpu.num_layers, 512).contiguous()
    regions = torch.arange(256, dtype=torch.uint8).remainder(12).expand(1, 256, 256).contiguous()
    with torch.inference_mode():
        difference = (cpu.synthesize(codes, regions) - gpu.synthesize(codes.cuda(), regions.cuda()).cpu()).abs().max()
    assert difference < 5e-2  # TF32 products


@pytest.mark.parametrize("stages", [(), ("swap=codes",)])
def test_pairs_on_the_gpu_are_close_to_the_cpu(people_folder: Path, tmp_path: Path, stages: tuple[str, ...]) -> None:
    for device in ("cpu", "cuda"):
        plan = make_plan(Request(manifest=str(people_folder), run=str(tmp_path / device), profile="fast", device=device, stages=stages))
        assert execute(plan, Lines()).exit_code == 0
        plan.close()
    rows = RunFolder(tmp_path / "cuda").read_rows()
    assert RunFolder(tmp_path / "cpu").read_rows()[0].key != rows[0].key  # artifacts of one device kind are not taken for the other's
    for row in rows:
        pictures = [decode_png((tmp_path / device / row.output).read_bytes()).astype(float) for device in ("cpu", "cuda")]
        assert np.abs(pictures[0] - pictures[1]).mean() < 1.0
