"""What makes Megatron-core run without CUDA, and nothing else."""

from __future__ import annotations

import pytest
import torch

from minitron_nemo.errors import UserError
from minitron_nemo.parallel import device
from tests.pool import run_distributed


def test_an_untested_megatron_core_is_refused_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_installed", False)
    monkeypatch.setattr(device, "version", lambda name: "0.99.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"megatron-core 0\.99\.0: .*pip install megatron-core==0\.16\.1"):
        device.install()


def test_nothing_is_changed_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_installed", False)
    monkeypatch.setattr(device, "version", lambda name: "0.99.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.synchronize
    device.install()
    assert torch.cuda.synchronize is before


def test_a_function_that_names_no_cuda_is_an_error_not_a_silent_gap() -> None:
    def innocent() -> str:
        return "cpu"

    with pytest.raises(RuntimeError, match="innocent names no CUDA device"):
        device._rename_devices(innocent)  # type: ignore[arg-type]


def test_devices_are_renamed_in_nested_code_and_in_method_calls() -> None:
    def names() -> tuple[str, bool, str]:
        inner = [kind.strip() for kind in ("cuda", "meta")]
        return inner[0], "torch.FloatTensor" in ["torch.cuda.FloatTensor", "other"], torch.ones(1).cuda().device.type

    device._rename_devices(names)  # type: ignore[arg-type]
    assert names() == ("cpu", True, "cpu")


def _random_states() -> tuple[bool, bool, bool]:
    from megatron.core import tensor_parallel

    from minitron_nemo.parallel import launch
    from minitron_nemo.parallel.layout import Layout

    launch.initialize(Layout(tensor_model_parallel_size=2), seed=5)
    outside = torch.rand(4)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    both: list[list[torch.Tensor]] = []
    for value in (outside, inside):
        parts = [torch.empty(4) for _ in range(2)]
        torch.distributed.all_gather(parts, value)
        both.append(parts)
    launch.initialize(Layout(tensor_model_parallel_size=2), seed=5)
    again = torch.equal(outside, torch.rand(4))
    return torch.equal(*both[0]), torch.equal(*both[1]), again


def test_random_states_differ_over_tensor_parallel_ranks_inside_the_fork_only() -> None:
    assert run_distributed(2, _random_states) == [(True, False, True)] * 2
