"""An output weight whose rows are laid out over the ranks as another model's are."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from minitron_nemo.kernels.shard import Shard


def reshard_rows(weight: Tensor, rows_per_rank: int, vocab_size: int, tp_group: dist.ProcessGroup | None) -> Tensor:
    """This rank's [rows_per_rank, h] of an output weight of which it holds [padded_vocab/tp, h], without gradients.

    Two models of one vocabulary may pad it differently (to 151936 and 152064 rows, say), so that a rank's rows of the
    one are not its rows of the other; the losses want the teacher's where the student's are. Padding rows become 0.
    One all-to-all over `tp_group`: a rank holds its old and its new rows, nothing else. Meant to be called once a run.

    Raises ValueError where either layout has no room for `vocab_size` rows.
    """
    old, new = Shard.of(weight.shape[0], vocab_size, tp_group), Shard.of(rows_per_rank, vocab_size, tp_group)
    resharded = weight.new_zeros(rows_per_rank, weight.shape[1])
    mine = weight.detach()[: old.rows].contiguous()
    if old.size == 1:
        resharded[: new.rows] = mine
        return resharded
    # In the order of ranks is in the order of rows, for what is sent and for what is received.
    dist.all_to_all_single(
        resharded[: new.rows],
        mine,
        output_split_sizes=[_common_rows(new, peer * weight.shape[0], weight.shape[0]) for peer in range(new.size)],
        input_split_sizes=[_common_rows(old, peer * rows_per_rank, rows_per_rank) for peer in range(old.size)],
        group=tp_group,
    )
    return resharded


def _common_rows(shard: Shard, first_row: int, rows: int) -> int:
    """How many of the shard's rows are among `rows` from `first_row` on."""
    return max(0, min(shard.first_row + shard.rows, first_row + rows) - max(shard.first_row, first_row))
