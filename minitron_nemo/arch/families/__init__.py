"""One module per model family; `TABLES` maps `Architecture.family` to its table of tensors."""

from minitron_nemo.arch.families import llama

TABLES = {"llama": llama.table}
