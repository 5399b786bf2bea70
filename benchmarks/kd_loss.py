"""What the distillation loss costs beyond its four matrix products, beside other ways to compute it.

    python benchmarks/kd_loss.py                                 both sizes, fp32 and bf16, on one CPU thread (20 min)
    python benchmarks/kd_loss.py --sizes small --dtype float32
    python benchmarks/kd_loss.py --tokens 256 --vocab 8192       a quick look
    python benchmarks/kd_loss.py --device cuda --tokens 8192 --vocab 128256 --student-width 3072 --teacher-width 4096

From hidden states and output weights to the gradients of the student's; forward KL at temperature 1. The peers are
their mathematics in this project's own words, Liger is Liger where liger-kernel is installed.

Columns on a CPU:
  CPU s       least process time of the repetitions; methods take turns
  x products  that, over the four products (student's logits, teacher's logits, dX, dW) in the inputs' dtype
  median      the same ratio, but the median over repetitions: far from the column before means a busy machine
  RSS MiB     peak resident memory of a fresh process, beyond inputs and delivered gradients
  tensors MiB peak of tensor storages, beyond delivered gradients: the same without allocator and libraries
  B/entry     bytes moved between memory and a 2 MiB cache per token x vocabulary entry, without the products
Columns on a GPU: time; what bytes / copy bandwidth + FLOPs / GEMM rate would take, both measured just before, for fp32
chunk logits written by the products, read by the statistics, read and written by the gradients (20 B/entry) and the
four products; time / floor; peak of allocated memory beyond inputs and gradients. Then the kernels that read a chunk's
logits: least time of each, and what bytes / copy bandwidth would take as a share of it.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from counters import PeakTensors, Traffic, forget_peak, peak_resident_bytes, resident_bytes
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.profiler import ProfilerActivity, profile

from minitron_nemo.kernels import linear_kd_loss, logits_kd_loss
from minitron_nemo.kernels.backend import backend
from minitron_nemo.kernels.dense import logit_gradients, loss_rows
from minitron_nemo.kernels.objective import DIVERGENCES, Objective
from minitron_nemo.kernels.shard import Shard

MIB = 1024**2
PRODUCTS = "four products"


@dataclass(frozen=True)
class Size:
    tokens: int
    vocab: int
    student_width: int
    teacher_width: int

    @property
    def entries(self) -> int:
        return self.tokens * self.vocab

    @property
    def flops(self) -> int:
        """Of the four products: three of the student's width, one of the teacher's."""
        return 2 * self.entries * (3 * self.student_width + self.teacher_width)


SIZES = {"small": Size(1024, 49152, 576, 576), "big": Size(256, 128256, 3072, 4096)}


@dataclass(frozen=True)
class Problem:
    student: Tensor  # [tokens, h_s]
    student_weight: Tensor  # [vocab, h_s]
    teacher: Tensor  # [tokens, h_t]
    teacher_weight: Tensor  # [vocab, h_t]
    labels: Tensor
    weights: Tensor
    chunk_bytes: int

    @staticmethod
    def random(size: Size, dtype: torch.dtype, device: torch.device, chunk_tokens: int) -> Problem:
        torch.manual_seed(0)

        def normal(rows: int, width: int, scale: float) -> Tensor:
            return torch.randn(rows, width, dtype=dtype, device=device).mul_(scale)

        return Problem(
            normal(size.tokens, size.student_width, 1.0).requires_grad_(),
            normal(size.vocab, size.student_width, size.student_width**-0.5).requires_grad_(),
            normal(size.tokens, size.teacher_width, 1.0),
            normal(size.vocab, size.teacher_width, size.teacher_width**-0.5),
            torch.randint(size.vocab, (size.tokens,), device=device),
            torch.ones(size.tokens, device=device),
            8 * size.vocab * chunk_tokens,
        )

    def clear(self) -> None:
        self.student.grad = self.student_weight.grad = None

    @property
    def delivered_bytes(self) -> int:
        return self.student.nbytes + self.student_weight.nbytes

    def logits(self) -> tuple[Tensor, Tensor]:
        """Both models' whole, in the inputs' dtype."""
        return self.student @ self.student_weight.t(), self.teacher @ self.teacher_weight.t()


def four_products(problem: Problem) -> None:
    with torch.no_grad():
        logits, _ = problem.logits()
        logits @ problem.student_weight
        logits.t() @ problem.student


def fused(problem: Problem) -> None:
    total, _ = linear_kd_loss(
        problem.student,
        problem.student_weight,
        problem.teacher,
        problem.teacher_weight,
        problem.labels,
        problem.weights,
        vocab_size=len(problem.student_weight),
        chunk_bytes=problem.chunk_bytes,
    )
    total.backward()


def from_logits(problem: Problem) -> None:
    vocab = len(problem.student_weight)
    logits_kd_loss(*problem.logits(), problem.labels, problem.weights, vocab_size=vocab)[0].backward()


def naive(problem: Problem) -> None:
    student, teacher = problem.logits()
    log_q, log_p = log_softmax(student.float(), -1), log_softmax(teacher.float(), -1)
    (kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * problem.weights).sum().backward()


def peer_whole(problem: Problem) -> None:
    """Model-Optimizer's loss without tensor parallelism: fp32 copies over a temperature, then torch's own KL."""
    student, teacher = (logits.float() / 1.0 for logits in problem.logits())
    log_q, log_p = log_softmax(student, -1), log_softmax(teacher, -1)
    (kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * problem.weights).sum().backward()


def peer_sharded(problem: Problem) -> None:
    """Model-Optimizer's loss under tensor parallelism, less its communication: each softmax in single steps."""
    log_probabilities = []
    for logits in problem.logits():
        scaled = logits.float() / 1.0
        centred = scaled - scaled.detach().max(-1, keepdim=True)[0]
        log_probabilities.append(centred - centred.exp().sum(-1, keepdim=True).log())
    loss = kl_div(*log_probabilities, reduction="none", log_target=True).sum(-1)
    (loss * problem.weights).sum().backward()


def liger(problem: Problem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = problem.student.is_cuda  # on a CPU that means a C++ compiler at run time
    tokens = problem.chunk_bytes // (8 * len(problem.student_weight))
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=tokens
    )
    loss(problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, problem.labels).backward()


METHODS: dict[str, Callable[[Problem], None]] = {
    PRODUCTS: four_products,
    "linear_kd_loss": fused,
    "logits_kd_loss": from_logits,
    "naive torch": naive,
    "Model-Optimizer, TP=1": peer_whole,
    "Model-Optimizer, TP>1": peer_sharded,
    **({"Liger, chunked JSD": liger} if find_spec("liger_kernel") else {}),
}


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    for size in sizes(options):
        for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
            print(f"\n{dtype}, {size.tokens} tokens, vocabulary {size.vocab}, ", end="")
            print(
                f"widths {size.student_width} and {size.teacher_width}, chunks of {options.chunk_tokens} tokens, ",
                end="",
            )
            print(f"{options.memory} memory, load {os.getloadavg()[0]:.1f}\n")
            measure = on_gpu if device.type == "cuda" else on_cpu
            measure(size, getattr(torch, dtype), options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("small", "big", "both"), default="both", help=f"{SIZES}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="this many, of a size of your own, instead of --sizes")
    parser.add_argument("--vocab", type=int, default=49152, help="with --tokens")
    parser.add_argument("--student-width", type=int, default=576, help="with --tokens")
    parser.add_argument("--teacher-width", type=int, default=576, help="with --tokens")
    parser.add_argument("--chunk-tokens", type=int, help="of linear_kd_loss and Liger; default 256, on GPUs 2048")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--memory",
        choices=("kept", "fresh"),
        default="kept",
        help="kept: freed memory stays with the process, so no method pays for pages that the kernel zeroes, and the "
        "ratio to the products is the strictest; fresh: large blocks come from the kernel each time, as glibc does",
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.chunk_tokens = options.chunk_tokens or (2048 if options.device == "cuda" else 256)
    if PRODUCTS not in options.methods:
        options.methods.insert(0, PRODUCTS)
    return options


def sizes(options: argparse.Namespace) -> list[Size]:
    if options.tokens:
        return [Size(options.tokens, options.vocab, options.student_width, options.teacher_width)]
    return [SIZES[name] for name in (SIZES if options.sizes == "both" else (options.sizes,))]


def on_cpu(size: Size, dtype: torch.dtype, options: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    resident = {}
    for name in options.methods:
        with spawn.Pool(1) as fresh_process:
            resident[name] = fresh_process.apply(extra_resident, (name, size, dtype, options))
    if options.memory == "kept":
        keep_freed_memory()
    problem = Problem.random(size, dtype, torch.device("cpu"), options.chunk_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in options.methods}
    for _ in range(options.repetitions):
        for name in options.methods:
            problem.clear()
            start = time.process_time()
            METHODS[name](problem)
            seconds[name].append(time.process_time() - start)
    print("| method | CPU s | x products | median | RSS MiB | tensors MiB | B/entry |\n|---|---|---|---|---|---|---|")
    for name in options.methods:
        ratio = min(seconds[name]) / min(seconds[PRODUCTS])
        median = statistics.median(a / b for a, b in zip(seconds[name], seconds[PRODUCTS], strict=True))
        tensors, moved = count(METHODS[name], problem)
        print(
            f"| {name} | {min(seconds[name]):.3f} | {ratio:.2f} | {median:.2f} | {resident[name] / MIB:.0f} "
            f"| {tensors / MIB:.0f} | {moved / size.entries:.0f} |",
            flush=True,
        )


def keep_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from the heap
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def count(method: Callable[[Problem], None], problem: Problem) -> tuple[int, int]:
    """Peak of tensor storages beyond the delivered gradients, bytes moved."""
    problem.clear()
    with PeakTensors() as tensors:
        method(problem)
    problem.clear()
    with Traffic() as traffic:
        method(problem)
    return tensors.peak - problem.delivered_bytes, traffic.total()


def extra_resident(name: str, size: Size, dtype: torch.dtype, options: argparse.Namespace) -> int:
    """Runs in a process of its own, after a small problem that makes the libraries load what they need."""
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    METHODS[name](Problem.random(Size(16, 512, size.student_width, size.teacher_width), dtype, cpu, 8))
    problem = Problem.random(size, dtype, cpu, options.chunk_tokens)
    forget_peak()
    before = resident_bytes()
    METHODS[name](problem)
    return peak_resident_bytes() - before - problem.delivered_bytes


def on_gpu(size: Size, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """One warm-up each (Triton compiles, the allocator grows), then interleaved repetitions between CUDA events."""
    device = torch.device("cuda")
    problem = Problem.random(size, dtype, device, options.chunk_tokens)
    bandwidth, rate = copy_bandwidth(device), gemm_rate(dtype, device)
    floor = 20 * size.entries / bandwidth + size.flops / rate
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s, ", end="")
    print(f"floor {floor * 1e3:.2f} ms")
    milliseconds: dict[str, list[float]] = {name: [] for name in options.methods}
    peaks = {}
    for name in options.methods:
        problem.clear()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        METHODS[name](problem)
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before - problem.delivered_bytes
    for _ in range(options.repetitions):
        for name in options.methods:
            problem.clear()
            milliseconds[name].append(event_seconds(METHODS[name], problem) * 1e3)
    print("| method | ms | x floor | x products | peak MiB |\n|---|---|---|---|---|")
    for name in options.methods:
        best = min(milliseconds[name])
        ratio = best / min(milliseconds[PRODUCTS])
        print(f"| {name} | {best:.2f} | {best / floor / 1e3:.2f} | {ratio:.2f} | {peaks[name] / MIB:.0f} |")
    on_gpu_rows(size, options, bandwidth)


def on_gpu_rows(size: Size, options: argparse.Namespace, bandwidth: float) -> None:
    """The kernels that read a chunk's logits: in fp32, as `linear_kd_loss` has them, and in bf16."""
    print("\n| divergence | logits | kernel | ms | of bandwidth |\n|---|---|---|---|---|")
    shape, device = (options.chunk_tokens, size.vocab), torch.device("cuda")
    for divergence in DIVERGENCES:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            for kernel, seconds in row_seconds(student, teacher, divergence, options.repetitions).items():
                share = (3 if kernel == "gradients" else 2) * student.nbytes / seconds / bandwidth
                logits = str(dtype).removeprefix("torch.")
                print(f"| {divergence} | {logits} | {kernel} | {seconds * 1e3:.3f} | {share:.0%} |", flush=True)


def row_seconds(student: Tensor, teacher: Tensor, divergence: str, repetitions: int) -> dict[str, float]:
    """Least time of each kernel, by torch's profiler: small operations between them are no part of it."""
    tokens, vocab = student.shape
    objective, shard = Objective(divergence), Shard.of(vocab, vocab, None)
    kernels, labels = backend(student.device).rows, torch.randint(vocab, (tokens,), device=student.device)
    weights = torch.ones(tokens, device=student.device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(1 + repetitions):  # for the first one Triton compiles
            rows = loss_rows(student, teacher, labels, shard, objective, kernels)
            logit_gradients(student, teacher, labels, weights, rows, shard, objective, kernels)
        torch.cuda.synchronize()
    events = {kernel: f"{kernel}_kernel" for kernel in ("statistics", "mixture", "gradients")}
    times = {
        kernel: [each.device_time for each in found.events() if each.name == name] for kernel, name in events.items()
    }
    return {kernel: min(each) / 1e6 for kernel, each in times.items() if each}


def event_seconds(function: Callable[..., object], *arguments: object) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1024 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(event_seconds(target.copy_, source) for _ in range(10))


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square product."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device=device) for _ in range(2))
    return 2 * 8192**3 / min(event_seconds(torch.mm, a, b) for _ in range(10))


if __name__ == "__main__":
    main()
