"""`minitron verify RECIPE`: is each checkpoint of a run that the transform wrote what it says? Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minitron_nemo.arch import Plan
from minitron_nemo.chain import Chain, chains
from minitron_nemo.checkpoint.verify import verify
from minitron_nemo.config import Recipe
from minitron_nemo.errors import UserError, on_every_rank
from minitron_nemo.parallel import launch
from minitron_nemo.stages import plans


class Claim(NamedTuple):
    """`written` is what `plan` makes of `source`; None: everything is kept."""

    source: Path
    written: Path
    plan: Plan | None


def verify_run(recipe: Recipe) -> bool:
    """Compare, in the processes of the job, what is there of the converted teacher, the pruned student and the exports.

    The student is compared with the Plan that the recipe makes of the Scores now, not with the one in its directory.
    Repairs are not computed again: that Plan with its repairs is the one that `repair` wrote, where the manifest says
    that it wrote it of this recipe and of what is there now. Rank 0 prints a line for each. True when every bit is
    right. Raises UserError for what cannot be read, for Scores of another model and a repaired Plan of another recipe,
    and where there is nothing yet.
    """
    walked = chains(launch.from_rank_0(lambda: plans(recipe, launch.world_size(), distils=False)))
    claims = [claim for chain in walked for claim in _claims(chain) if claim.written.exists()]
    if not claims:
        raise UserError(f"{recipe.run_dir}: nothing has been converted or pruned yet; run the chain first")
    held = [_holds(claim) for claim in claims]  # all of them are said
    return all(held)


def _claims(chain: Chain) -> Iterator[Claim]:
    if chain.before is None:
        yield Claim(launch.from_rank_0(chain.source_path), chain.converted, None)
    if chain.pruned.exists():
        yield Claim(chain.source, chain.pruned, chain.planned())
    for to in chain.recipe.export.formats:
        yield Claim(chain.student, chain.exports / to, None)


def _holds(claim: Claim) -> bool:
    rank, world_size = launch.rank(), launch.world_size()
    mine = on_every_rank(lambda: verify(*claim, rank=rank, world_size=world_size), rank, launch.gather)
    found = [difference for difference in launch.gather(mine) if difference is not None]
    if rank == 0:
        says = f"DIFFERS: {min(found).text}" if found else f"every bit is what is made of {claim.source}"
        print(f"[verify] {claim.written}: {says}", flush=True)
    launch.barrier()  # nobody ends before it is said
    return not found
