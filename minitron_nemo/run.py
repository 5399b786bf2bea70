"""Walking the chain of steps, inside the job.

Every rank walks the same steps, whether torchrun, srun or a plain start made it. Rank 0 decides whether a step has to
run, and records it. A step that was killed is started again and resumes by itself.
"""

from __future__ import annotations

from pathlib import Path

from minitron_nemo.chain import ABSENT, chains, leading_page
from minitron_nemo.checkpoint.files import needing_room, write_atomic
from minitron_nemo.claim import claimed
from minitron_nemo.config import RECIPE_FILE, Recipe, recipe_yaml
from minitron_nemo.distillation.status import write_failure, write_status
from minitron_nemo.errors import SaidByRankZero, UserError
from minitron_nemo.parallel import launch
from minitron_nemo.preflight import Preflight
from minitron_nemo.stages import check_choice, plans
from minitron_nemo.steps import Stopped, run_step, stopped_by_signals
from minitron_nemo.summary import print_summary


def run_chain(recipe: Recipe, only: str | None = None, until: str | None = None, stage: str | None = None) -> None:
    """Run the whole chain, all of it up to and with the step `until`, or the step `only`, on every rank of the job.

    With `stage`, only what belongs to this stage. Raises UserError for wrong input, Stopped where a signal ended the
    training with its state saved, Failed where the disk is full.
    """

    def planned() -> list[Preflight]:
        check_choice(recipe, only, until, stage)
        return plans(recipe, launch.world_size(), distils=only in (None, "distill") and until is None)

    walked = chains(launch.from_rank_0(planned))
    run_dir = Path(recipe.run_dir)
    every = [*(step for chain in walked for step in chain.steps()), *leading_page(walked)]
    steps = [step for step in every if only in (None, step.name) and stage in (None, step.stage)]
    if until is not None:
        steps = steps[: [step.name for step in steps].index(until) + 1]
    if not steps:
        raise UserError(f"{only}: the recipe has no such step ({ABSENT[str(only)]})")
    with needing_room(run_dir), claimed(run_dir, *(chain.directory for chain in walked)):
        launch.from_rank_0(lambda: _keep_recipe(recipe, run_dir / RECIPE_FILE))
        for step in steps:
            try:
                with stopped_by_signals():
                    run_step(step, run_dir, every)
            except Stopped as stop:
                if stop.args:  # a training says so by itself
                    write_status(run_dir, "stopped", step=step.label, reason=stop.args[0])
                raise
            except SaidByRankZero:
                raise
            except Exception as error:
                write_failure(run_dir, step=step.label, reason=f"rank {launch.job_rank()}: {error}")
                raise
        launch.from_rank_0(lambda: write_status(run_dir, "done", step=only or until))
    if only is None and until is None and stage is None:
        launch.from_rank_0(lambda: print_summary(run_dir, {chain.plan.stage: chain.directory for chain in walked}))


def _keep_recipe(recipe: Recipe, path: Path) -> None:
    text = recipe_yaml(recipe)
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
