"""Saving and loading Megatron's DistributedOptimizer when torch's AdamW is what it wraps.

Megatron-core falls back to `torch.optim.AdamW` where neither TransformerEngine nor Apex provides an Adam. That one
keeps a `step` tensor per parameter, which Megatron-core 0.16.1 does not expect in three places; one of them gives wrong
numbers in silence. None of this has to do with the device, and nothing is changed where another optimizer is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_installed = False


def install() -> None:
    """Apply the fixes to Megatron-core's DistributedOptimizer, once and only where it wraps torch's AdamW."""
    from megatron.core import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    global _installed
    if _installed or not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    _fill_missing_state(DistributedOptimizer)
    _copy_stored_state_only(DistributedOptimizer)
    _give_every_parameter_its_step(DistributedOptimizer)
    _installed = True


def _fill_missing_state(cls: Any) -> None:
    """distrib_optimizer.py:642 asserts that every parameter has a step; before the first one none has a state."""
    original = cls.state_dict

    @wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                state.setdefault("exp_avg", torch.zeros_like(parameter.data))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter.data))
        result: dict[str, Any] = original(self)
        return result

    cls.state_dict = state_dict


def _copy_stored_state_only(cls: Any) -> None:
    """distrib_optimizer.py:938 copies over the state's own keys, `step` among them, which is not stored per parameter.

    It also writes to main parameters, leaves that require gradients, with gradients enabled.
    """

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self: Any, model_param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        for key, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":
                target.copy_(tensors[key])

    cls._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states


def _give_every_parameter_its_step(cls: Any) -> None:
    """distrib_optimizer.py:825 gives all parameters one `step` tensor, which AdamW then advances once per parameter."""
    original = cls.load_state_dict

    @wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    cls.load_state_dict = load_state_dict
