"""What NeMo 2.7.3 needs CUDA or TransformerEngine for, answered on a CPU. Tests alone use this.

Each line names the place in NeMo (nemo/...) that forces it; what Megatron-core needs is `parallel.device`'s business.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import tensor_parallel
from nemo.collections.llm.gpt.model import base
from nemo.lightning import megatron_init, nemo_logger
from nemo.lightning.io import pl as checkpoint_io

from minitron_nemo.models.build import _block_spec
from minitron_nemo.parallel import device, launch
from minitron_nemo.parallel.console import silence_known_warnings


def install() -> None:
    """Let NeMo's trainer run on the CPU, in this process from here on."""
    silence_known_warnings()
    device.install()
    launch._save_without_manager()
    # lightning/megatron_parallel.py:617: DDP is made on a stream of its own.
    torch.cuda.Stream = lambda *arguments, **options: None  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]
    # collections/llm/gpt/model/base.py:103: batches go to the GPU.
    torch.Tensor.cuda = lambda self, *arguments, **options: self  # type: ignore[method-assign]
    # lightning/pytorch/strategies/megatron_strategy.py:801, 850, 881; lightning/pytorch/plugins/data_sampler.py:192,
    # 212: what is logged goes there, from pinned memory.
    make, move = torch.tensor, torch.Tensor.to

    def tensor(data: Any, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(data, **options)

    def to(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return move(self, *("cpu" if argument == "cuda" else argument for argument in arguments), **options)

    torch.tensor, torch.Tensor.to = tensor, to  # type: ignore[assignment,method-assign]
    # lightning/nemo_logger.py:208, 253: asks for a class of nvidia-resiliency-ext, to tell its callbacks from others.
    nemo_logger.lcp = SimpleNamespace(LocalCheckpointCallback=type(None))
    # lightning/megatron_init.py:238: only GPUs get the random states that weights are initialised from.
    megatron_init._set_random_seed = tensor_parallel.model_parallel_cuda_manual_seed
    # lightning/io/pl.py:495: what was loaded is moved to the GPU, which has to be initialised.
    checkpoint_io._fix_tensors_device = lambda checkpoint: checkpoint
    # collections/llm/gpt/model/base.py:222: Megatron-core's local spec with its own norm, which refuses Llama's config.
    base.local_layer_spec = lambda config: _block_spec(config, None)
