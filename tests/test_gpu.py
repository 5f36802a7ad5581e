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


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("tf32", 1e-2), ("bfloat16", 1e-1)])
def test_mask_guided_layers_on_the_gpu_are_the_loop(precision: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of different masks, against the per-region loop on the CPU; relative to the largest value."""
    from e4s_models.stylegan2_layers import Regions, region_conv, region_conv_ref

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", precision == "tf32")
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 64, 32, 32, generator=draw), torch.randn(48, 64, 3, 3, generator=draw)
    styles, ids = torch.randn(2, 12, 64, generator=draw), torch.randint(0, 12, (2, 16, 16), generator=draw).to(torch.uint8)
    for up in (1, 2):
        loop = region_conv_ref(x, weight, styles, Regions(ids, 12), up, True)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                fast = region_conv(x.cuda(), weight.cuda(), styles.cuda(), Regions(ids.cuda(), 12), up, True)
            assert (fast.float().cpu() - loop).abs().max() <= limit * loop.abs().max()


def test_mask_guided_gradients_on_the_gpu_equal_the_loops() -> None:
    from e4s_models.stylegan2_layers import Regions, region_conv, region_conv_ref

    draw = torch.Generator().manual_seed(0)
    values = [
        torch.randn(*shape, generator=draw, dtype=torch.float64).cuda().requires_grad_()
        for shape in ((2, 3, 8, 8), (5, 3, 3, 3), (2, 4, 3))
    ]
    ids = torch.randint(0, 4, (2, 16, 16), generator=draw).to(torch.uint8).cuda()
    for up in (1, 2):
        gradients = [
            torch.autograd.grad(layer(*values, Regions(ids, 4), up, True).square().sum(), values)
            for layer in (region_conv, region_conv_ref)
        ]
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected)


def test_seams_wait_for_the_gpu_no_more_often_with_more_regions() -> None:
    """Host synchronisations are counted, not timed: their number must not depend on the number of regions."""
    import warnings

    from e4s_models.stylegan2_layers import Regions, region_conv

    def waits(num: int) -> int:
        ids = torch.arange(256, device="cuda").remainder(num).to(torch.uint8).view(1, 16, 16)
        x, weight, styles = (torch.randn(*shape, device="cuda") for shape in ((1, 8, 16, 16), (8, 8, 3, 3), (1, num, 8)))
        with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                regions = Regions(ids, num)
                for up in (1, 2):
                    region_conv(x, weight, styles, regions, up, True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    waits(2)  # loads the kernels
    assert waits(2) == waits(12)


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
