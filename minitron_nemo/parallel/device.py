"""Every difference between CPU and GPU.

Without CUDA, Megatron-core needs three things, all installed by `install`: answers to the `torch.cuda` functions it
calls unconditionally, CPU generators behind its random-state helpers, and CPU names in the functions that spell out
`"cuda"` or a CUDA tensor type. The last are changed where they are, constant by constant, so that no other code in
the process sees another torch. Without TransformerEngine, on either device, its routers need a name that is missing.
The line numbers are those of 0.16.1; 0.15.3, which NeMo 2.7 needs, has the same functions. Versions this was not tested
with are refused.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import CodeType, FunctionType
from typing import Any

import psutil
import torch
from torch.distributed import Store

from minitron_nemo.errors import UserError
from minitron_nemo.parallel.gpus import peak_flops_of

TESTED_VERSIONS = ("0.15.3", "0.16.1")

# Functions of megatron.core that name CUDA, in a literal or as tensor.cuda(), and the lines that do.
NAMING_CUDA: dict[str, tuple[str, ...]] = {
    "pipeline_parallel.schedules": (
        "forward_backward_no_pipelining",  # 596: device="cuda" of the token count
        "forward_backward_pipelining_with_interleaving",  # 983
        "forward_backward_pipelining_without_interleaving",  # 2138
    ),
    "optimizer.clip_grads": (
        "get_grad_norm_fp32",  # 90, 103, 115
        "clip_grad_by_total_norm_fp32",  # 167 (tensor type), 174
        "count_zeros_fp32",  # 207
    ),
    "optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",  # 473, 481, 485
        "Float16OptimizerWithFloat16Params.__init__",  # 671, 690 (tensor types)
        "FP32Optimizer.__init__",  # 907
    ),
    "optimizer.distrib_optimizer": (
        "DistributedOptimizer._build_model_and_main_param_groups",  # 361, 420 (tensor types)
        "DistributedOptimizer.__init__",  # 582 (tensor types)
        "DistributedOptimizer.get_parameter_state_dp_zero",  # 1089 (tensor.cuda())
    ),
    "dist_checkpointing.strategies.state_dict_saver": ("verify_global_md_reuse",),  # 204
    "dist_checkpointing.exchange_utils": (
        "_get_empty_tensor_for_exchange",  # 98, 104, 106, 110
        "exchange_loaded_tensors_gather_rounds",  # 326, 336 (tensor.cuda())
        "exchange_loaded_tensors_broadcast",  # 499 (tensor.cuda())
    ),
    "models.common.language_module.language_module": (
        "LanguageModule.setup_embeddings_and_output_layer",  # weight.data.cuda() of embeddings tied across stages
    ),
    "transformer.utils": ("get_default_causal_mask", "get_sliding_window_causal_mask"),  # 35, 40
    "utils": ("local_multi_tensor_l2_norm",),  # 1207
}

CPU_NAMES = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_installed = False


def current_device() -> torch.device:
    """The device this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of that device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def link(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group outside torch's default one, whose `send` and `recv` return work for `finish`. Collective."""
    if not torch.cuda.is_available():
        return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(store, rank, size, options)


def finish(work: Any) -> None:
    """Block this thread until a transfer of `link` is done. Raises what went wrong with it."""
    if torch.cuda.is_available():  # where wait() makes the GPU wait, not the thread
        while not work.is_completed():
            time.sleep(0.001)
    work.wait()


def has_transformer_engine() -> bool:
    """Whether TransformerEngine is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def peak_flops() -> float | None:
    """bf16 FLOP/s that the device of this process can reach at most; None for a CPU and for an unknown GPU."""
    return peak_flops_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def memory() -> dict[str, float]:
    """Bytes this process takes: the most on its GPU since `reset_peak_memory`; without one, what is resident now."""
    if torch.cuda.is_available():
        return {"peak_allocated_bytes": torch.cuda.max_memory_allocated()}
    return {"resident_bytes": psutil.Process().memory_info().rss}


def reset_peak_memory() -> None:
    """Begin anew with what `peak_memory` says."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Most bytes allocated on this process's GPU since the last reset; without one, what is resident now."""
    return int(next(iter(memory().values())))


class Stopwatch:
    """Context manager that adds up time: of the work its body gave the GPU, wall time where there is none."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = _mark()

    def __exit__(self, *raised: object) -> None:
        self._spans.append((self._start, _mark()))

    def take(self) -> float:
        """Seconds since the last call. Waits for the GPU."""
        spans, self._spans = self._spans, []
        if not torch.cuda.is_available():
            return sum(end - start for start, end in spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000  # milliseconds


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process sees; none without CUDA."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (list(map(str, range(count))) if named is None else named.split(","))[:count]


def check_gpu(wanted: str) -> None:
    """Raise UserError where this process sees no GPU, and would compute on the CPU what is meant for a `wanted` one."""
    if not torch.cuda.is_available():
        raise UserError(
            f"cluster.gpu: {wanted}, but this process sees no GPU; ask Slurm for GPUs by cluster.gpus_per_node, or set "
            "cluster.gpu=null to compute on the CPU"
        )


def choose(local_rank: int) -> None:
    """Make this process use the GPU of its place on the machine; nothing to choose without CUDA."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def install() -> None:
    """Make Megatron-core run on the CPU where CUDA is not available, and its routers without TransformerEngine.

    Raises UserError for a megatron-core version that this was not tested with.
    """
    global _installed
    # moe_utils.py:1192 and 1234 ask whether this is None, and only the import of TransformerEngine defines it.
    vars(import_module("megatron.core.transformer.moe.moe_utils")).setdefault("te_general_gemm", None)
    if torch.cuda.is_available() or _installed:
        return
    found = version("megatron-core")
    if found not in TESTED_VERSIONS:
        raise UserError(
            f"megatron-core {found}: running without a GPU is tested with {', '.join(TESTED_VERSIONS)} only; "
            f"pip install megatron-core=={TESTED_VERSIONS[-1]}"
        )
    _patch_torch_cuda()
    _patch_random_state()
    for module_name, functions in NAMING_CUDA.items():
        module = import_module(f"megatron.core.{module_name}")
        for name in functions:
            _rename_devices(_function(module, name))
    _installed = True


def _mark() -> Any:
    """A point in time of the device's work."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _patch_torch_cuda() -> None:
    cpu = torch.device("cpu")
    # e.g. rotary_pos_embedding.py:162, layers.py:552, mappings.py:141, param_and_grad_buffer.py:800, utils.py:631
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    # p2p_communication.py:398, filesystem_async.py:230, fully_parallel.py:272, parallel_state.py:198
    torch.cuda.synchronize = lambda device=None: None
    # random.py:235-240, 422
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _patch_random_state() -> None:
    """random.py:55 and 85-100: the model-parallel and recomputation random states are those of CUDA generators."""
    random: Any = import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _function(module: Any, qualified_name: str) -> FunctionType:
    target = module
    for part in qualified_name.split("."):
        target = getattr(target, part)
    while hasattr(target, "__wrapped__"):
        target = target.__wrapped__
    return getattr(target, "__func__", target)


def _rename_devices(function: FunctionType) -> None:
    """Replace CUDA names by CPU names in a function's code, in place: it may be imported elsewhere already."""
    code = _renamed(function.__code__)
    if code == function.__code__:
        raise RuntimeError(f"{function.__module__}.{function.__qualname__} names no CUDA device")
    function.__code__ = code


def _renamed(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        # co_names holds the attributes a function asks for: tensor.cuda() becomes tensor.cpu()
        return constant.replace(
            co_consts=tuple(_renamed(item) for item in constant.co_consts),
            co_names=tuple(_renamed(item) for item in constant.co_names),
        )
    if isinstance(constant, tuple):
        return tuple(_renamed(item) for item in constant)
    return CPU_NAMES.get(constant, constant) if isinstance(constant, str) else constant
