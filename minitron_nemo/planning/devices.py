"""The device that a plan counts with: what the recipe says about it, and how layers run there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minitron_nemo.config import Recipe
from minitron_nemo.parallel.device import current_device, has_transformer_engine
from minitron_nemo.parallel.gpus import GPUS

# Share of its memory that a job may fill by arithmetic. The rest is for what arithmetic leaves out: the driver's
# context, NCCL's buffers, workspaces of cuBLAS, and gaps between blocks of torch's allocator.
USABLE = 0.9


@dataclass(frozen=True)
class Device:
    """Bytes, FLOP/s and bytes/s of one device; None for what is not known, which then is not predicted.

    With `transformer_engine` layers are TransformerEngine's, and attention of 16-bit numbers keeps no scores. On a
    `cpu` messages are gloo's: sent by the processors that compute, so that nothing hides them, and reduced in copies.
    """

    memory_bytes: float | None = None
    peak_flops: float | None = None  # in `train.precision`
    calibration_peak_flops: float | None = None  # in `prune.calibration.precision`
    memory_bandwidth: float | None = None
    # Between processes of a node, one way; or, where kinds of messages differ, of each kind (`Transfer.kind`).
    link: float | Mapping[str, float] | None = None
    network: float | None = None  # between nodes
    transformer_engine: bool = False
    cpu: bool = False
    name: str = "device"

    @staticmethod
    def of_recipe(recipe: Recipe) -> Device:
        """That of `cluster.gpu`, with the recipe's own figures on top.

        Layers are those of the machine that plans; where that has no GPU and `cluster.gpu` is one, TransformerEngine's.
        """
        cluster, train = recipe.cluster, recipe.train
        gpu = None if cluster.gpu is None else GPUS[cluster.gpu]
        peaks = {"bf16": gpu.peak_flops} if gpu else {}
        if train.peak_flops is not None:
            peaks[train.precision] = train.peak_flops
        return Device(
            memory_bytes=cluster.gpu_memory_bytes or (gpu.memory_bytes if gpu else None),
            peak_flops=peaks.get(train.precision),
            calibration_peak_flops=peaks.get(recipe.prune.calibration.precision),
            memory_bandwidth=gpu.memory_bandwidth if gpu else None,
            link=gpu.link if gpu else None,
            network=gpu.network if gpu else None,
            transformer_engine=has_transformer_engine() or (gpu is not None and current_device().type == "cpu"),
            cpu=gpu is None and current_device().type == "cpu",
            name=cluster.gpu or "device",
        )

    def bandwidth(self, kind: str, within_node: bool) -> float | None:
        """Bytes/s of messages of one kind."""
        if not within_node:
            return self.network
        return self.link[kind] if isinstance(self.link, Mapping) else self.link

    def fits(self, amount: float) -> bool | None:
        """Whether `amount` bytes go into the usable part; None where the memory is not known."""
        return None if self.memory_bytes is None else amount <= USABLE * self.memory_bytes
