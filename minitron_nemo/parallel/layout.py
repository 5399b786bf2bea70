"""`Layout`: the parallel sizes of a job, and what a model must satisfy to run on them."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.config import ParallelConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel.device import has_transformer_engine


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; the data-parallel size is what the number of processes leaves (`data_parallel_size`)."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    num_layers_per_stage: tuple[int, ...] | None = None

    @staticmethod
    def from_config(config: ParallelConfig) -> Layout:
        """The layout a recipe asks for. One virtual stage is the same as none."""
        virtual, split = config.virtual_pipeline_model_parallel_size, config.num_layers_per_stage
        return Layout(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=None if virtual == 1 else virtual,
            context_parallel_size=config.context_parallel_size,
            sequence_parallel=config.sequence_parallel,
            num_layers_per_stage=None if split is None else tuple(split),
        )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model (context-parallel ranks counted)."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.model_parallel_size

    @property
    def stages(self) -> int:
        """Pieces the layers are cut into: pipeline ranks times virtual stages."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Layers of every stage, in the order of the model; stage i is virtual stage i // pp of pipeline rank i % pp.

        `num_layers_per_stage`, where it is of a model of this depth. Otherwise as even as possible; what is left over
        goes to the middle: the first stage also has the embedding, the last one the output projection and the loss.
        """
        if self.num_layers_per_stage is not None and sum(self.num_layers_per_stage) == num_layers:
            return list(self.num_layers_per_stage)
        least, left_over = divmod(num_layers, self.stages)
        first = (self.stages - left_over) // 2
        return [least + (first <= stage < first + left_over) for stage in range(self.stages)]

    def padded(self, architecture: Architecture) -> Architecture:
        """The shape that is built: query groups up to a multiple of the tensor-parallel size, those added of zeros."""
        tp = self.tensor_model_parallel_size
        groups = -(-architecture.num_query_groups // tp) * tp
        if groups == architecture.num_query_groups:
            return architecture
        return architecture.resized({Axis.GROUPS: groups, Axis.HEADS: groups * architecture.heads_per_group})

    def __str__(self) -> str:
        text = f"tp={self.tensor_model_parallel_size} pp={self.pipeline_model_parallel_size}"
        if self.virtual_pipeline_model_parallel_size:
            text += f" vpp={self.virtual_pipeline_model_parallel_size}"
        if self.context_parallel_size > 1:
            text += f" cp={self.context_parallel_size}"
        if self.num_layers_per_stage:
            text += f" layers={'+'.join(map(str, self.num_layers_per_stage))}"
        return text + (" sp" if self.sequence_parallel else "")

    def check(self, architecture: Architecture, world_size: int, section: str = "parallel") -> None:
        """Raise UserError, naming the key of the recipe's `section`, unless `architecture` runs on this layout."""
        self.check_processes(world_size, section)
        tp = self.tensor_model_parallel_size
        if tp > 1 and architecture.num_moe_experts and not self.sequence_parallel:
            raise UserError(
                f"{section}.sequence_parallel: Megatron-core trains a mixture of experts on {tp} tensor-parallel ranks "
                "with it alone; set it to true"
            )
        for axis in (Axis.FFN, Axis.MOE_FFN, Axis.SHARED_FFN):
            if (size := architecture.size(axis)) % tp:
                fitting = [n for n in range(1, min(size, world_size) + 1) if _fits(architecture, n)]
                raise UserError(
                    f"{section}.tensor_model_parallel_size: {tp} does not divide the model's {axis} {size}; "
                    f"use one of {fitting}, or pipeline stages instead"
                )
        if architecture.num_layers < self.stages:
            virtual = self.virtual_pipeline_model_parallel_size
            key = "virtual_pipeline_model_parallel_size" if virtual else "pipeline_model_parallel_size"
            raise UserError(
                f"{section}.{key}: {architecture.num_layers} layers are too few for {self.stages} stages; "
                f"make pipeline times virtual stages {architecture.num_layers} at most"
            )

    def check_split(self, model: str, num_layers: int, section: str = "parallel") -> None:
        """Raise UserError unless an explicit split is of `model`, student or teacher, with its `num_layers`."""
        split = self.num_layers_per_stage
        if split is not None and sum(split) != num_layers:
            raise UserError(
                f"{section}.num_layers_per_stage: {list(split)} are {sum(split)} layers, and the {model} has "
                f"{num_layers}; give all of them, or leave it out for an even split"
            )

    def check_batches(
        self, global_batch_size: int, micro_batch_size: int, sequence_length: int, world_size: int
    ) -> None:
        """Raise UserError, naming the recipe's key, unless batches and sequences split evenly on this layout."""
        data_parallel = self.data_parallel_size(world_size)
        if global_batch_size % (micro_batch_size * data_parallel):
            raise UserError(
                f"train.global_batch_size: {global_batch_size} is not a multiple of train.micro_batch_size "
                f"{micro_batch_size} x data-parallel size {data_parallel}; change one of them"
            )
        count = global_batch_size // (micro_batch_size * data_parallel)
        if self.virtual_pipeline_model_parallel_size and count % self.pipeline_model_parallel_size:
            raise UserError(
                f"train.global_batch_size: {global_batch_size} makes {count} microbatches a rank; with virtual stages "
                f"it must be a multiple of parallel.pipeline_model_parallel_size {self.pipeline_model_parallel_size}; "
                f"change the batch sizes"
            )
        self.check_length(sequence_length)

    def check_length(self, sequence_length: int) -> None:
        """Raise UserError, naming the recipe's key, unless the states of a sequence split evenly over its ranks."""
        if sequence_length % self.tensor_model_parallel_size:
            raise UserError(
                f"data.sequence_length: {sequence_length} is not a multiple of parallel.tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size}, over which hidden states are split; change one of them"
            )

    def check_processes(self, world_size: int, section: str = "parallel") -> None:
        """The part of `check` that needs no model."""
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
        }
        if self.virtual_pipeline_model_parallel_size is not None:
            sizes["virtual_pipeline_model_parallel_size"] = self.virtual_pipeline_model_parallel_size
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{section}.{name}: {size} is not a size; use 1 or more")
        if self.context_parallel_size > 1 and not has_transformer_engine():
            raise UserError(
                f"{section}.context_parallel_size: {self.context_parallel_size} needs TransformerEngine and a GPU; "
                "use 1"
            )
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise UserError(
                f"{section}.virtual_pipeline_model_parallel_size: virtual stages need pipeline_model_parallel_size of "
                "2 or more; leave it out"
            )
        split = self.num_layers_per_stage
        if split is not None and (len(split) != self.stages or min(split) < 1):
            raise UserError(
                f"{section}.num_layers_per_stage: {list(split)} must give each of the {self.stages} stages (pipeline "
                "times virtual ones) a layer or more"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError(
                f"{section}.sequence_parallel: it splits the sequence over tensor-parallel ranks, and "
                "tensor_model_parallel_size is 1; set it to false"
            )
        if world_size % self.model_parallel_size:
            raise UserError(
                f"{section}: {self} needs a multiple of {self.model_parallel_size} processes, and this job has "
                f"{world_size}; change the sizes or cluster.nodes and cluster.processes_per_node"
            )


def _fits(architecture: Architecture, tp: int) -> bool:
    return all(architecture.size(axis) % tp == 0 for axis in (Axis.FFN, Axis.MOE_FFN, Axis.SHARED_FFN))
