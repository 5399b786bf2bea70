"""CPU time and peak extra memory of the fused loss, against its four matrix products, naive and ModelOpt-style maths.

    python benchmarks/kd_loss.py [--dtype bfloat16] [--tokens 1024] [--vocab 49152] [--hidden 576]

Times are process CPU time, the least of interleaved repetitions, forward and backward together. Extra bytes are the
peak of live tensor storage beyond inputs and gradients, counted at every ATen operation: workspaces inside oneDNN are
not seen.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_nemo.kernels import linear_kd_loss

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class PeakStorage(TorchDispatchMode):
    """Bytes of tensor storages that operations create, and the highest sum alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, inputs)
        return result

    def _note(self, tensor: Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in inputs:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def fused(inputs: Inputs, vocab_size: int) -> None:
    linear_kd_loss(*inputs, vocab_size=vocab_size)[0].backward()


def four_products(inputs: Inputs, vocab_size: int) -> None:
    """The two projections and the student's two gradient products, in the inputs' dtype, without any loss."""
    student, student_weight, teacher, teacher_weight = (tensor.detach() for tensor in inputs[:4])
    logits = student @ student_weight.t()
    teacher @ teacher_weight.t()
    logits @ student_weight
    logits.t() @ student


def naive(inputs: Inputs, vocab_size: int) -> None:
    """torch's own KL divergence on full logits cast to fp32."""
    student, student_weight, teacher, teacher_weight, _, weights = inputs
    log_p = log_softmax((student @ student_weight.t()).float(), -1)
    with torch.no_grad():
        log_q = log_softmax((teacher @ teacher_weight.t()).float(), -1)
    (kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * weights).sum().backward()


def separate_softmax(inputs: Inputs, vocab_size: int) -> None:
    """The way of ModelOpt's LogitsKLLoss under tensor parallelism: maxima, exponentials, sums and logs one by one."""
    student, student_weight, teacher, teacher_weight, _, weights = inputs
    s = (student @ student_weight.t()).float()
    t = (teacher @ teacher_weight.t()).float().detach()
    s = s - s.detach().amax(-1, keepdim=True)
    t = t - t.amax(-1, keepdim=True)
    log_p = s - s.exp().sum(-1, keepdim=True).log()
    log_q = t - t.exp().sum(-1, keepdim=True).log()
    ((log_q.exp() * (log_q - log_p)).sum(-1) * weights).sum().backward()


METHODS: dict[str, Callable[[Inputs, int], None]] = {
    "four matrix products": four_products,
    "linear_kd_loss": fused,
    "naive kl_div": naive,
    "ModelOpt-style maths": separate_softmax,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    inputs = _inputs(options.tokens, options.vocab, options.hidden, getattr(torch, options.dtype))
    seconds = dict.fromkeys(METHODS, float("inf"))
    for _ in range(options.repetitions):
        for name, method in METHODS.items():
            seconds[name] = min(seconds[name], _cpu_seconds(method, inputs, options.vocab))
    print(f"{options.dtype}, {options.tokens} tokens, vocabulary {options.vocab}, hidden {options.hidden}, ", end="")
    print(f"{torch.get_num_threads()} thread(s)\n")
    print("| method | CPU s | x products | peak extra MiB |\n|---|---|---|---|")
    for name, method in METHODS.items():
        ratio, extra = seconds[name] / seconds["four matrix products"], _extra_bytes(method, inputs, options.vocab)
        print(f"| {name} | {seconds[name]:.3f} | {ratio:.2f} | {extra / 2**20:.0f} |")


def _inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return (torch.randn(rows, hidden, generator=generator) * scale).to(dtype)

    student, student_weight = normal(tokens, 1.0).requires_grad_(), normal(vocab, 0.1).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return student, student_weight, normal(tokens, 1.0), normal(vocab, 0.1), labels, torch.ones(tokens)


def _clear(inputs: Inputs) -> None:
    for tensor in inputs:
        tensor.grad = None


def _cpu_seconds(method: Callable[[Inputs, int], None], inputs: Inputs, vocab: int) -> float:
    _clear(inputs)
    start = time.process_time()
    method(inputs, vocab)
    return time.process_time() - start


def _extra_bytes(method: Callable[[Inputs, int], None], inputs: Inputs, vocab: int) -> int:
    """Peak beyond the gradients as delivered, which the caller asked for."""
    _clear(inputs)
    with PeakStorage() as counter:
        method(inputs, vocab)
    delivered = sum(tensor.numel() * tensor.element_size() for tensor in inputs[:2])
    return counter.peak - delivered


if __name__ == "__main__":
    main()
