"""Builds Megatron's GPTModel from an Architecture, loads and saves it, runs it forward."""
