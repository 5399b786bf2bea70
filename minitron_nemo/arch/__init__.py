"""Model families as tables of named axes; counts and configuration mapping. No weights, no torch."""

from minitron_nemo.arch.architecture import Architecture
from minitron_nemo.arch.axes import Axis
from minitron_nemo.arch.plan import Plan

__all__ = ["Architecture", "Axis", "Plan"]
