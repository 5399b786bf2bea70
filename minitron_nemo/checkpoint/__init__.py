"""One reader and writer per checkpoint format, the streaming transform between them, and fingerprints.

Knows architectures, not models: no Megatron, no process groups.
"""
