"""The factories say what recipes/*.yaml says, and run under NeMo-Run's executors."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import fiddle
import nemo_run as run
import pytest
import yaml
from nemo.collections import llm

from minitron_nemo.config import load_recipe
from minitron_nemo.nemo import llm_distill, recipes
from minitron_nemo.nemo.cli import VERBS

RECIPES = Path(__file__).parents[2] / "recipes"


def _yaml(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((RECIPES / f"{recipes.SHIPPED[name]}.yaml").read_text())
    return content


@pytest.mark.parametrize("name", recipes.SHIPPED)
def test_the_task_holds_the_recipe(name: str) -> None:
    task = getattr(recipes, name)("distill")
    built = fiddle.build(task.recipe)
    expected = load_recipe(RECIPES / f"{recipes.SHIPPED[name]}.yaml")
    expected.run_dir = "runs/${name}"  # it follows the name
    assert built == expected
    assert task.__fn_or_cls__ is VERBS["distill"]


@pytest.mark.parametrize("name", recipes.SHIPPED)
@pytest.mark.parametrize("target", [llm.distill, llm_distill], ids=["llm.distill", "llm_distill"])
def test_nemos_trainer_gets_the_recipes_figures(name: str, target: Any) -> None:
    task = run.cli.resolve_factory(target, f"minitron_{name}")()
    content = _yaml(name)
    train, parallel = content["train"], content["parallel"]
    assert task.trainer.max_steps == train["steps"]
    assert task.data.global_batch_size == train["global_batch_size"]
    assert task.data.seq_length == content["data"]["sequence_length"]
    assert task.optim.config.lr == train["lr"]
    assert (task.optim.lr_scheduler.min_lr, task.optim.lr_scheduler.warmup_steps) == (
        train["min_lr"],
        train["warmup_steps"],
    )
    assert task.trainer.strategy.tensor_model_parallel_size == parallel["tensor_model_parallel_size"]
    assert task.trainer.num_nodes * task.trainer.devices == 32 * 8


def test_nemos_pruning_gets_the_recipes_target() -> None:
    width = run.cli.resolve_factory(llm.prune, "minitron_llama31_4b_width")("/text").pruning_config
    assert (width.target_hidden_size, width.target_ffn_hidden_size, width.drop_layers) == (3072, 9216, None)
    depth = run.cli.resolve_factory(llm.prune, "minitron_llama31_4b_depth")("/text")
    assert depth.pruning_config.drop_layers == [*range(16, 32)]  # 2408.11796: counted from 1
    assert depth.data.paths == ["/text"]


@pytest.mark.slow
def test_a_local_executor_runs_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It calls `python` by its name, and in a directory of its own.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    task = recipes.llama31_4b_width("plan")
    task.recipe.run_dir = str(tmp_path / "run")
    with run.Experiment("minitron", base_dir=str(tmp_path / "experiments")) as experiment:
        experiment.add(task, executor=run.LocalExecutor(), name="plan")
        experiment.run(detach=False, tail_logs=False)
    logs = [path.read_text() for path in (tmp_path / "experiments").rglob("*.log") if path.is_file()]
    assert any("hidden 3072, ffn 9216" in log for log in logs), logs


def test_a_slurm_executor_starts_a_task_with_srun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())  # which the tunnel passes on
    tunnel = run.LocalTunnel(job_dir=str(tmp_path / "jobs"))
    executor = run.SlurmExecutor(
        account="me",
        partition="big",
        nodes=2,
        ntasks_per_node=8,
        tunnel=tunnel,
        packager=run.Packager(),  # the package is in the container
    )
    with run.Experiment("minitron", base_dir=str(tmp_path / "experiments")) as experiment:
        experiment.add(recipes.mistral_nemo_8b(), executor=executor, name="chain")
        experiment.dryrun(delete_exp_dir=False)
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in printed
    assert "srun" in printed
