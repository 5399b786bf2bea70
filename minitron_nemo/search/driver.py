"""`minitron search`: cut and measure every candidate, train the best, measure, train the best of those longer.

    RUN/search/NAME/        run directory of a candidate, with a recipe and a result for every rung it came to
    RUN/search/table.*      written again after every rung
    RUN/search/depth.npz    the teacher without layers, measured for all candidates by the job that cuts them
    RUN/search/driver/      status and lock of a search that starts processes or jobs; otherwise they are the run's

Each rung trains anew from the cut model, with a schedule that ends at its own last update: losses at the end of a
schedule are what the ranking is about, and in the midst of a longer one, at a high learning rate, they are not it yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from minitron_nemo.chain import unchanged
from minitron_nemo.claim import claimed
from minitron_nemo.config import Recipe
from minitron_nemo.distillation.nonfinite import Diverged
from minitron_nemo.distillation.status import write_failure, write_status
from minitron_nemo.errors import Failed, SaidByRankZero, UserError
from minitron_nemo.parallel import launch
from minitron_nemo.preflight import preflight
from minitron_nemo.pruning.score_depth import score_depth
from minitron_nemo.run import run_chain
from minitron_nemo.search.candidates import driver_directory, search_directory
from minitron_nemo.search.launchers import Launcher, LocalProcesses, SlurmJobs, Task, gpu_shares
from minitron_nemo.search.plan import SearchPlan, plan_search
from minitron_nemo.search.results import Result, Standing, ranked, save_failure, survivors, usable
from minitron_nemo.search.table import BEST, forget, write_table
from minitron_nemo.search.trials import Trial, ended_well, known, mark, reason, record, trial_of, write_recipe
from minitron_nemo.steps import Stopped, stopped_by_signals
from minitron_nemo.work import DEPTH_FILE

# What turns a search that starts processes or jobs into its own first task: all candidates cut and measured in one job.
FIRST = ("search.launcher=none", "search.rungs=[]")
AGAIN = "mend that and call the search again, which goes on with what is left"


def search(recipe: Recipe, path: Path, overrides: Sequence[str]) -> None:
    """Search by the recipe in `path` with `overrides`. Collective over the job; one process with another launcher.

    Raises UserError for wrong input, Stopped where a signal ended it, and in the end Failed on rank 0, SaidByRankZero
    on the others, for candidates that have no loss. Whatever ended it: called again, it goes on with what is left.
    """
    config, outside = recipe.search, recipe.search.launcher != "none"
    if outside and launch.job_size() > 1:
        raise UserError(
            f"search.launcher: {config.launcher} starts what it needs by itself, outside a job; use none within one"
        )
    size = None if outside else launch.world_size()
    plan = launch.from_rank_0(lambda: plan_search(preflight(recipe, size)))
    place = driver_directory(recipe) if outside else Path(recipe.run_dir)
    with claimed(place), _told(place):
        launch.from_rank_0(partial(forget, recipe))
        _say(f"{len(plan.candidates)} candidates within the budget, of {plan.grid_size:,} in the grid")
        if outside:
            launcher: Launcher = SlurmJobs(config.jobs)
            if config.launcher == "local":
                launcher = LocalProcesses(gpu_shares(config.jobs, plan.world_size))
            _first_outside(plan, launcher, path, overrides)
            standings = _rungs(plan, launcher)
        else:
            run_chain(recipe, until="calibrate")
            launch.from_rank_0(partial(write_status, place, "running", step="search"))
            _measure_depths(plan)
            standings = _rungs(plan, None)
        _check(standings)


def _measure_depths(plan: SearchPlan) -> None:
    """Measure the teacher without layers as all candidates need it, each model once; their chains take it from here.

    The fewest layers come first: what `greedy` measures for them is all that it asks for the others.
    """
    by_depth = {each.architecture.num_layers: each for each in plan.candidates}
    for _, candidate in sorted(by_depth.items()):
        chain = trial_of(plan, candidate, 0).chain
        if chain.plan.drop:
            measured = search_directory(plan.recipe) / DEPTH_FILE
            with stopped_by_signals():
                score_depth(chain.source, chain.prepared, chain.recipe, chain.plan.layout, measured, chain.lent_depths)


def _rungs(plan: SearchPlan, launcher: Launcher | None) -> list[Standing]:
    """Measure, drop, train, until the last rung; says the table. Those that failed go no further."""
    config = plan.recipe.search
    entrants, out = [Standing(candidate, ()) for candidate in plan.candidates], list[Standing]()
    rungs = (0, *config.rungs)
    for number, steps in enumerate(rungs):
        entrants = _measured(plan, entrants, steps, launcher)
        text = launch.from_rank_0(partial(write_table, plan.recipe, [*entrants, *out], rungs[: number + 1]))
        kept = _admitted(entrants, plan) if steps == 0 else survivors(entrants, config.keep)
        if number + 1 < len(rungs):
            _say(f"after {steps} updates: {len(kept)} of {len(entrants)} go on to {rungs[number + 1]}")
        out += [standing for standing in entrants if standing not in kept]
        entrants = kept
        if not entrants:
            break
    standings = ranked([*entrants, *out])
    if launch.rank() == 0:
        winner = search_directory(plan.recipe) / BEST
        print(f"{text}\n-> {winner}" if winner.exists() else text, flush=True)
    return standings


def _check(standings: Sequence[Standing]) -> None:
    """Raise for candidates that have no loss."""
    failed = [f"{each.candidate.name}: {each.last.failure}" for each in standings if each.last.failure is not None]
    if failed:
        raise (Failed if launch.rank() == 0 else SaidByRankZero)(f"{'; '.join(failed)}; {AGAIN}")


def _admitted(standings: Sequence[Standing], plan: SearchPlan) -> list[Standing]:
    """Those that have a loss and generate fast enough and, of them, the `top_k` with the lowest losses as cut.

    Collective. Raises UserError where none of those with a loss is fast enough.
    """
    least = plan.recipe.search.budget.min_tokens_per_second
    fast, finite = usable(standings, least), usable(standings, None)

    def check() -> None:
        if finite and not fast:
            fastest = max(each.tokens_per_second or 0.0 for each in finite)
            raise UserError(
                f"search.budget.min_tokens_per_second: {least:g}, and the fastest candidate makes {fastest:.1f}; lower "
                "it, or give the grid smaller shapes"
            )

    launch.from_rank_0(check)
    return fast[: plan.recipe.search.top_k]


def _measured(plan: SearchPlan, standings: Sequence[Standing], steps: int, launcher: Launcher | None) -> list[Standing]:
    """The standings with their results after `steps` updates; what is known already is not done again."""
    trials = {each.candidate.name: trial_of(plan, each.candidate, steps) for each in standings}
    results = {name: found for name, trial in trials.items() if (found := known(trial)) is not None}
    missing = [trial for name, trial in trials.items() if name not in results]
    for trial, failure in _here(missing) if launcher is None else _outside(missing, launcher):
        name = trial.candidate.name
        if failure is None:
            results[name] = launch.from_rank_0(partial(record, trial))
            _say(f"{name}: loss {results[name].loss:.4f} after {steps} updates")
        else:
            results[name] = Result.failed(steps, failure)
            _say(f"{name}: failed before {steps} updates: {failure}")
    return [replace(each, results=(*each.results, results[each.candidate.name])) for each in standings]


def _here(trials: Sequence[Trial]) -> Iterator[tuple[Trial, str | None]]:
    """One after the other, on all ranks of this job; with each, why its training diverged, if it did.

    Whatever else goes wrong ends the search as it would a run, since ranks may be anywhere then. So they may where a
    separate teacher's processes lose a training that diverges: that is recorded, and the next call goes past it.
    """
    for trial in trials:
        launch.from_rank_0(partial(write_recipe, trial))
        failure = None
        try:
            run_chain(trial.chain.recipe)
        except Diverged as error:
            failure = str(error)
            if launch.job_rank() == 0:
                assert trial.key is not None, "what is trained was cut from teacher, text and Scores"
                save_failure(trial.result_file, trial.key, trial.steps, failure)
            if trial.chain.recipe.teacher.placement == "separate":
                raise
        yield trial, failure


def _outside(trials: Sequence[Trial], launcher: Launcher) -> Iterator[tuple[Trial, str | None]]:
    """As processes or jobs of their own; with each, why it did not end well, if it did not."""
    tasks = {}
    for trial in trials:
        if unchanged(trial.chain):  # it ended while nobody was there to record it
            yield trial, None
        else:
            file = write_recipe(trial)
            name = f"{trial.chain.recipe.name}-{mark(trial.directory, trial.key)}"
            tasks[name] = trial, Task(name, "run", (str(file),), trial.chain.recipe, file.with_suffix(".log"))
    for name in launcher.run([task for _, task in tasks.values()]):
        trial, task = tasks[name]
        well = ended_well(trial, launcher.patience)
        yield trial, None if well else f"{reason(trial.directory)}, see {task.log}"


def _first_outside(plan: SearchPlan, launcher: Launcher, path: Path, overrides: Sequence[str]) -> None:
    """Have one process or job make teacher, text and Scores, and cut and measure all candidates."""

    def missing() -> bool:
        return any(known(trial_of(plan, candidate, 0)) is None for candidate in plan.candidates)

    def made() -> bool:
        """Whether nothing is missing once the task has run, or the one of its name that is there already."""
        for _ in launcher.run([task]):
            deadline = time.monotonic() + launcher.patience
            while missing():
                if time.monotonic() > deadline:
                    return False
                time.sleep(1)
        return True

    if not missing():
        return
    run_dir, arguments = Path(plan.recipe.run_dir), (str(path), *overrides, *FIRST)
    name = f"{plan.recipe.name}-search-{mark(run_dir, None)}"  # one at a time, whatever its settings
    log = driver_directory(plan.recipe) / "first.log"
    task = Task(name, "search", arguments, plan.recipe, log)
    earlier = name in launcher.left_over()  # of a call that may have had other settings
    if not made() and not (earlier and made()):
        raise Failed(f"{name}, the cuts of all candidates: {reason(run_dir)}, see {log}; {AGAIN}")


@contextmanager
def _told(run_dir: Path) -> Iterator[None]:
    """status.json there says what becomes of the search."""
    launch.from_rank_0(partial(write_status, run_dir, "running", step="search"))
    try:
        yield
    except Stopped as stop:
        if launch.rank() == 0:  # the others may be anywhere
            write_status(run_dir, "stopped", step="search", reason=", ".join(stop.args) or None)
        raise
    except SaidByRankZero:
        raise
    except Exception as error:
        write_failure(run_dir, step="search", reason=f"rank {launch.job_rank()}: {error}")
        raise
    launch.from_rank_0(partial(write_status, run_dir, "done", step="search"))


def _say(message: str) -> None:
    if launch.rank() == 0:
        print(f"[search] {message}", flush=True)
