"""Held-out loss, divergence to the teacher, agreement and generation speed, side by side for several models."""
