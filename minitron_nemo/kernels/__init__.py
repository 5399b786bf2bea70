"""Loss kernels. Depends on torch alone: process groups arrive as arguments, models are unknown here."""

from minitron_nemo.kernels.linear_kd import linear_kd_loss, token_statistics
from minitron_nemo.kernels.sparse import SparseTeacher
from minitron_nemo.kernels.sums import LossSums

__all__ = ["LossSums", "SparseTeacher", "linear_kd_loss", "token_statistics"]
