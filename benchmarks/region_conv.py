"""What regional styles cost the published generator: `python -m benchmarks.region_conv [--quick]`.

One whole 1024 px pass, three times with the same weights, noise, layout and threads: plain StyleGAN2 (one code), the fast mask-guided
layers and the published loop over regions (`region_conv_ref`), each with 12 regions and K = 13. Label maps are those of synthetic
people, as the face parser sees them. Passes are timed in turns, a person per turn; ratios are medians over turns. By arithmetic the loop
costs 7.7 plain passes; above 14 it is badly written and the comparison void.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.generator import timed_in_turns
from benchmarks.result import Results
from e4s_models.face_parser import FaceParser
from e4s_models.mobile_stylegan import MobileStyleGAN
from e4s_models.regions import BISENET19_TO_REGIONS, NUM_REGIONS
from e4s_models.stylegan2 import StyledConv, StyleGAN2
from e4s_models.stylegan2_layers import Modulated, ToRGB, region_conv_ref
from flows.synth import person_w, picture
from tasks.parse import parse_labels

SIDES = ("plain", "fast", "loop")


def face_maps(count: int) -> Tensor:
    """Label maps of synthetic people: (count, 1024, 1024) uint8 region ids."""
    generator, parser = MobileStyleGAN.load(), FaceParser.load("cpu")
    pictures = [torch.from_numpy(picture(generator, person_w(generator, seed, 0.7))) for seed in range(count)]
    labels = parse_labels(parser, [rgb.permute(2, 0, 1) / 127.5 - 1 for rgb in pictures], side=512)
    return torch.from_numpy(BISENET19_TO_REGIONS[torch.stack(labels).numpy()])


class LayerTimes:
    """Seconds of every modulated layer of a network on CPU, by what `side` says."""

    def __init__(self, network: nn.Module) -> None:
        self.side = ""
        self.seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for name, layer in network.named_modules():
            if isinstance(layer, Modulated):
                layer.register_forward_pre_hook(lambda *_, name=name: self.seconds[name, self.side].append(-time.perf_counter()))
                layer.register_forward_hook(lambda *_, name=name: self._stop(name))

    def _stop(self, name: str) -> None:
        self.seconds[name, self.side][-1] += time.perf_counter()

    def milliseconds(self, name: str) -> list[float]:
        """Median of each side, the first (warm-up) pass left out."""
        return [1e3 * float(np.median(self.seconds[name, side][1:])) for side in SIDES]


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest absolute value."""
    return float((value.float() - exact).abs().max() / exact.abs().max())


class Passes:
    """The three passes, and the fast one in bfloat16, of one person at a time."""

    def __init__(self, network: StyleGAN2, codes: Tensor, maps: Tensor) -> None:
        self.network, self.codes, self.maps = network, codes, maps
        self.times = LayerTimes(network)

    def run(self, side: str, person: int) -> Tensor:
        """One person's picture, (1, 3, side, side)."""
        self.times.side = side
        codes, maps = self.codes[person, None], self.maps[person, None]
        if side == "plain":
            return self.network(codes[:, :1])  # type: ignore[no-any-return]
        if side == "loop":
            with mock.patch("e4s_models.stylegan2_layers.region_conv", region_conv_ref):
                return self.network(codes, maps)  # type: ignore[no-any-return]
        with torch.autocast("cpu", torch.bfloat16, enabled=side == "bfloat16"):
            return self.network(codes, maps)  # type: ignore[no-any-return]

    def call(self, side: str) -> Callable[[], Tensor]:
        """A call that takes the next person every time."""
        people = itertools.cycle(range(len(self.maps)))
        return lambda: self.run(side, next(people))


def print_layers(network: StyleGAN2, times: LayerTimes) -> None:
    """A line per modulated layer; the last line is what lies outside of them (noise, activation, enlarging the picture)."""
    print(f"{'layer':>16} {'out px':>6} {'channels':>10} {'styles':>8} {'plain ms':>8} {'fast ms':>8} {'loop ms':>8} {'fast/plain':>10}")
    for i, conv in enumerate(network.convs):
        to_rgb = network.to_rgbs[i // 2]
        assert isinstance(conv, StyledConv) and isinstance(to_rgb, ToRGB)
        layers = [(i, f"convs.{i}.conv", conv.conv)]
        if i % 2 == 0:
            layers.append((i + 1, f"to_rgbs.{i // 2}.conv", to_rgb.conv))
        for number, name, layer in layers:
            plain, fast, loop = times.milliseconds(name)
            widths = f"{layer.weight.shape[2]}->{layer.weight.shape[1]}"
            styles = "regional" if number < network.region_layers else "one"
            side = conv.noise.shape[-1]
            print(f"{name:>16} {side:6d} {widths:>10} {styles:>8} {plain:8.1f} {fast:8.1f} {loop:8.1f} {fast / plain:10.2f}")


def measure_cuda(network: StyleGAN2, codes: Tensor, maps: Tensor, results: Results) -> None:
    """Rates at batches of 1, 4 and 16 different people, and what lower precision costs; only where there is a GPU."""
    exact = network.cpu()(codes[:1], maps[:1])
    network = network.cuda()
    print(f"{'GPU':>10} {'batch':>5} {'plain /s':>9} {'fast /s':>9} {'fast/plain':>10} {'error':>8}")
    for precision in ("float32", "tf32", "bfloat16"):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        for batch in (1, 4, 16):
            some = torch.arange(batch) % len(maps)
            some_codes, some_maps = codes[some].cuda(), maps[some].cuda()

            def timed(codes: Tensor, maps: Tensor | None, precision: str = precision) -> Callable[[], Tensor]:
                def call() -> Tensor:
                    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                        out: Tensor = network(codes, maps)
                    torch.cuda.synchronize()
                    return out

                return call

            plain, fast = timed(some_codes[:, :1], None), timed(some_codes, some_maps)
            seconds = timed_in_turns((plain, fast), turns=11)
            ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
            rates = batch / np.median(seconds, axis=0)
            error = relative_error(fast()[:1].cpu(), exact)
            print(f"{precision:>10} {batch:5d} {rates[0]:9.1f} {rates[1]:9.1f} {ratio:10.2f} {error:8.1e}", flush=True)
            if batch == 4 and precision == "float32":
                results.claim("gpu_fast_over_plain", ratio, 1.5)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.region_conv", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a thin generator of 256 px, one thread, fewer turns (for the test suite)")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1 if quick else 2)
    results = Results("region_conv")
    maps = face_maps(1 if quick else 3)
    present = [len(torch.unique(labels)) for labels in maps]
    print(f"{NUM_REGIONS} regions, of which these people show {', '.join(map(str, present))}; {torch.get_num_threads()} threads")

    torch.manual_seed(0)
    network = StyleGAN2(256, max_width=128, width_times_side=1 << 13) if quick else StyleGAN2()
    network = network.eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.1)
    codes = torch.randn(len(maps), NUM_REGIONS, network.num_layers, network.code_dim)
    passes = Passes(network, codes, maps)
    turns = 2 if quick else 5
    with torch.inference_mode():
        seconds = timed_in_turns([passes.call(side) for side in SIDES], turns)  # (turns, 3)
        print_layers(network, passes.times)
        plain, fast, loop = 1e3 * np.median(seconds, axis=0)
        fast_over_plain = float(np.median(seconds[:, 1] / seconds[:, 0]))
        print(f"{'whole pass':>16} {network.side:6d} {'':>10} {'':>8} {plain:8.0f} {fast:8.0f} {loop:8.0f} {fast_over_plain:10.2f}")
        lower = timed_in_turns([passes.call("fast"), passes.call("bfloat16")], turns)

        difference, lower_error = 0.0, 0.0
        for person in range(len(maps)):
            exact = passes.run("fast", person)
            difference = max(difference, relative_error(exact, passes.run("loop", person)))
            lower_error = max(lower_error, relative_error(passes.run("bfloat16", person), exact))
        print(
            f"bfloat16 autocast on CPU: {np.median(lower[:, 0] / lower[:, 1]):.2f} times faster than the fast pass in float32, "
            f"error {lower_error:.2g} of the largest value"
        )
        if torch.cuda.is_available():
            measure_cuda(network, codes, maps, results)
    results.claim("fast_minus_loop", difference, 1e-5)
    results.claim("bfloat16_error", lower_error, 0.1)
    results.claim("loop_over_plain", float(np.median(seconds[:, 2] / seconds[:, 0])), 14)
    results.claim("fast_over_plain", fast_over_plain, 2)
    results.claim("loop_over_fast", float(np.median(seconds[:, 2] / seconds[:, 1])), 4, ">=")
    return results.exit_code()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
