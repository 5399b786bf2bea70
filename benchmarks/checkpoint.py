"""How long training stands still for a checkpoint: its files written while training goes on, and waited for.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --pipeline 2 [--saves 3] [--directory DIR]

A student of the quickstart's shape (104.6M parameters, random weights, bf16 with fp32 main parameters and moments)
trained on random tokens by cross-entropy. Each save is made twice: synchronously, and beside training steps. The stall
is what the trainer reports as `checkpoint/stall_seconds`, of rank 0; the smallest counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.arch import Architecture
from minitron_nemo.config import TrainConfig
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import build_optimizer, ddp_config, params_dtype, update
from minitron_nemo.distillation.state import Saved, TrainingState
from minitron_nemo.distillation.step import Step
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.device import current_device
from minitron_nemo.parallel.layout import Layout

VOCABULARY, SEQUENCE = 49152, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--microbatches", type=int, default=4, help="sequences of 256 in a step, of each rank")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's temporary directory")
    options = parser.parse_args()
    launch.join_job()
    layout = Layout(options.tensor, options.pipeline)
    launch.initialize(layout, seed=1)
    config = TrainConfig(steps=1, lr=1e-4, min_lr=0.0, precision="bf16")
    student = build_student(options.layers, layout, config)
    optimizer = build_optimizer(config, student)
    step = Step(student, None, DistillationObjective.cross_entropy(2**26))

    def train() -> None:
        step(random_batches(options.microbatches))
        update(optimizer)

    train()  # the moments exist only after an update
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        path = Path(launch.from_rank_0(lambda: name))
        state = TrainingState(path, student, optimizer, {}, keep_last=1)
        state.resume()
        rows = [measure(state, train, 2 * number) for number in range(options.saves + 1)]
        size = sum(file.stat().st_size for file in max(path.glob("iter_*")).iterdir())
        launch.barrier()
    if launch.rank() == 0:
        best = [min(column) for column in zip(*rows[1:], strict=True)]  # the first is a warm-up
        print(f"{size / 2**20:,.0f} MiB, {layout}, {launch.world_size()} processes")
        print("| save | training stands still, s | files, s | a step, s | a step meanwhile, s |\n|---|---|---|---|---|")
        print(f"| synchronous | {best[0]:.2f} | {best[1]:.2f} | {best[2]:.2f} | |")
        print(f"| beside training | {best[3]:.2f} | {best[4]:.2f} | | {best[5]:.2f} |")
    launch.shutdown()


def build_student(layers: int, layout: Layout, config: TrainConfig) -> Model:
    architecture = Architecture(
        num_layers=layers,
        hidden_size=576,
        ffn_hidden_size=960,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        share_embeddings_and_output_weights=True,
    )
    student = build_model(architecture, layout, dtype=params_dtype(config), ddp=ddp_config(config))
    for chunk in student.chunks:
        for name, parameter in chunk.named_parameters():
            torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return student


def random_batches(count: int) -> list[dict[str, Any]]:
    shape, device = (1, SEQUENCE), current_device()
    return [
        {
            "tokens": torch.randint(0, VOCABULARY, shape, device=device),
            "labels": torch.randint(0, VOCABULARY, shape, device=device),
            "position_ids": torch.arange(SEQUENCE, device=device).expand(shape),
            "token_weights": torch.ones(shape, device=device),
        }
        for _ in range(count)
    ]


def measure(state: TrainingState, train: Any, iteration: int) -> tuple[float, float, float, float, float, float]:
    """Stall and writing of a synchronous save, a step; stall and writing of one beside training, a step meanwhile."""
    state.save(iteration, {})
    waited = state.finish()
    assert waited is not None
    alone = timed(train)
    state.save(iteration + 1, {})
    meanwhile: list[float] = []
    beside: Saved | None = None
    while beside is None:
        meanwhile.append(timed(train))
        beside = state.poll()
    return (
        waited.stall_seconds,
        waited.write_seconds,
        alone,
        beside.stall_seconds,
        beside.write_seconds,
        min(meanwhile),
    )


def timed(work: Any) -> float:
    launch.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
