"""What a fit to so many tokens does to an expert on tokens that it has not seen, by two ridges.

    python -m benchmarks.few_tokens [--place runs/mixtures]

The experts are those of the teacher of `benchmarks.mixtures`, which is made if it is not there; of those that enough of
the calibration tokens come to, linear_fc2 is cut to two thirds of its columns and fitted to the first 1, 2, 4, ... of
them. Printed is the squared error of its output, over that of the plain cut, on the last TEST tokens: the mean and the
largest over all experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.mixtures import bench_of
from minitron_nemo.importance.counted import transformer_layers
from minitron_nemo.importance.experts import experts_of
from minitron_nemo.importance.second_moments import least_squares
from minitron_nemo.models.forward import forward_only
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.pruning.calibrate import without_logits

TEST = 1500
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RIDGE, COLUMNS = 0.01, 128


def experts(place: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """What linear_fc2 of an expert read, [t, f], in an order drawn once, and its weight [h, f]; fp64."""
    model, batches = bench_of(place).calibration
    read: dict[Tensor, list[Tensor]] = {}

    def keep(weight: Tensor, module: object, args: tuple[Tensor, ...]) -> None:
        read.setdefault(weight, []).append(args[0].double())

    for layer in transformer_layers(model.chunks[0]):
        for expert in experts_of(layer):
            expert.linear_fc2.register_forward_pre_hook(partial(keep, expert.linear_fc2.weight))
    micro_batch_size, length = batches[0]["tokens"].shape
    with without_logits(model):
        forward_only(model, batches, len(batches), length, micro_batch_size, lambda output, batch: None)
    generator = torch.Generator().manual_seed(0)
    for weight, parts in read.items():
        rows = torch.cat(parts)
        if len(rows) >= 2 * TEST:
            yield rows[torch.randperm(len(rows), generator=generator)], weight.detach().double()


def errors(rows: Tensor, weight: Tensor) -> Iterator[tuple[str, int, float]]:
    """Ridge, tokens, and the error of a fit over that of the plain cut."""
    test, seen = rows[-TEST:], rows[:-TEST]
    scores = test.square().mean(dim=0).sqrt() * weight.norm(dim=0)
    cut = np.sort(scores.argsort(descending=True)[:COLUMNS].numpy())
    wanted, left = test @ weight.t(), test[:, torch.from_numpy(cut)]
    plain = (left @ weight[:, torch.from_numpy(cut)].t() - wanted).square().sum()
    for count in COUNTS:
        x = seen[:count]
        y = x[:, torch.from_numpy(cut)]
        for name, factor in (("ridge", 1.0), ("ridge (k / t)^3", max(1.0, COLUMNS / count) ** 3)):
            fitted = least_squares(x.t() @ y, y.t() @ y, cut, RIDGE * factor)
            yield name, count, float((left @ (weight @ fitted).t() - wanted).square().sum() / plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/mixtures"), help="that of benchmarks.mixtures")
    options = parser.parse_args()
    launch.join_job()
    launch.initialize(Layout(), 0)
    found: dict[tuple[str, int], list[float]] = {}
    for rows, weight in experts(options.place):
        for name, count, error in errors(rows, weight):
            found.setdefault((name, count), []).append(error)
    launch.shutdown()
    print(f"| tokens | {' | '.join(map(str, COUNTS))} |\n|---|{'---|' * len(COUNTS)}")
    for name in dict.fromkeys(name for name, _ in found):
        cells = [f"{np.mean(found[name, count]):.2f}, {max(found[name, count]):.2f}" for count in COUNTS]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"{len(found[name, 1])} experts")


if __name__ == "__main__":
    main()
