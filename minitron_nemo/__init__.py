"""Prune large language models by structure and distil the original into what is left (Minitron)."""

__version__ = "0.1.0"
