"""Loss kernels. Depends on torch alone: process groups arrive as arguments, models are unknown here."""

from minitron_nemo.kernels.attach import attach_loss
from minitron_nemo.kernels.hidden import HiddenSums, linear_hidden_loss
from minitron_nemo.kernels.linear_kd import linear_kd_loss
from minitron_nemo.kernels.logits_kd import logits_kd_loss
from minitron_nemo.kernels.resharding import reshard_rows
from minitron_nemo.kernels.sparse import SparseTeacher
from minitron_nemo.kernels.sparsify import SparseEntries, sparse_entries
from minitron_nemo.kernels.statistics import label_statistics, token_statistics
from minitron_nemo.kernels.sums import LossSums

__all__ = [
    "HiddenSums",
    "LossSums",
    "SparseEntries",
    "SparseTeacher",
    "attach_loss",
    "label_statistics",
    "linear_hidden_loss",
    "linear_kd_loss",
    "logits_kd_loss",
    "reshard_rows",
    "sparse_entries",
    "token_statistics",
]
