"""Run directories with figures out of a random generator, of every part that a report can show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.arch.counts import non_embedding_parameters, parameters
from minitron_nemo.arch.matrix import GAIN, REPLACE, Matrix
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.config import CalibrationConfig, PruneConfig
from minitron_nemo.data.prepared import Prepared, PreparedSource, Split
from minitron_nemo.importance.scores import Scores
from minitron_nemo.models.branches import Branch
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.plan import make_plan

TEACHER = Architecture(
    num_layers=12,
    hidden_size=96,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=12,
    vocab_size=32000,
    max_position_embeddings=4096,
)
PRUNE = PruneConfig(
    hidden_size=72,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_layers=9,
    calibration=CalibrationConfig(aggregations={"hidden_size": {"batch": "mean"}}),
)
MIXTURE = replace(
    TEACHER,
    num_layers=6,
    family="qwen2_moe",
    model_type="qwen2_moe",
    ffn_hidden_size=64,
    num_moe_experts=6,
    moe_ffn_hidden_size=64,
    moe_router_topk=2,
    moe_shared_expert_intermediate_size=80,
)
PRUNE_MIXTURE = PruneConfig(
    num_layers=5, num_moe_experts=4, moe_ffn_hidden_size=40, moe_shared_expert_intermediate_size=48
)
ROTATE = replace(PRUNE, hidden_method="rotate")
KEEPS = 0.9614  # of the squares, the rotation of a run that is pruned by ROTATE
KEY = "0123456789abcdef" * 4
# Fingerprints of models, by the step that makes them, and the steps that made those measured.
MADE = {step: str(number) * 64 for number, step in enumerate(("convert", "correct", "prune", "distill"), 1)}
MEASURED = {"source": "convert", "teacher": "correct", "pruned": "prune", "distilled": "distill"}
RECIPE = """\
name: synthetic
model: {source: /models/teacher}
data: {train: [{path: /text}], sequence_length: 2048}
train: {steps: 60, global_batch_size: 8}
"""
EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of positions, as `evaluate` has them
HOSTILE = "</dd><script>document.title = 'taken'</script> \x00\x07 & <b>bold</b>"


def write_run(directory: Path, updates: int = 60, teacher: Architecture = TEACHER, prune: PruneConfig = PRUNE) -> Path:
    """A finished run with everything, `updates` long; returns `directory`."""
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    scores = random_scores(generator, teacher)
    scores.save(directory / "scores.npz")
    plan = make_plan(scores, teacher, prune)
    if plan.rotated:
        provenance = {**plan.provenance, "rotation_keeps": KEEPS}
        plan = replace(plan, matrices=rotating(plan.source, plan.target), provenance=provenance)
    (directory / "pruned").mkdir()
    plan.save(directory / "pruned" / "plan.json")
    write_json(directory / "evaluation.json", measured := evaluation(teacher, plan.target))
    write_json(directory / "tasks.json", tasks(measured))
    write_metrics(directory / "training" / "distilled-01234567", updates, generator, hidden=True)
    write_metrics(directory / "training" / "corrected-01234567", 12, generator)
    (directory / "search").mkdir()
    write_json(directory / "search" / "table.json", {"schema_version": 1, "candidates": candidates()})
    depth_scores(generator, teacher, plan.kept_layers).save(directory / "depth.npz")
    write_json(directory / "manifest.json", {"schema_version": 1, "steps": steps()})
    write_status(directory, "done", "export")
    (directory / "recipe.yaml").write_text(RECIPE)
    write_documents(directory / "data")
    return directory


def write_baseline(directory: Path) -> Path:
    """A run that has only trained, from worse weights and for longer; returns `directory`."""
    write_metrics(directory / "training" / "distilled-89abcdef", 120, np.random.default_rng(3), start=9.0)
    write_status(directory, "running", "distill")
    (directory / "recipe.yaml").write_text(RECIPE)
    write_documents(directory / "data")
    return directory


def write_documents(directory: Path, train: str = KEY, heldout: str = KEY) -> None:
    """The prepared.json of text with these hashes."""
    train_split, heldout_split = (
        Split(f"00-text/{name}", 9, 9000, 40000, sha256) for name, sha256 in (("train", train), ("heldout", heldout))
    )
    source = PreparedSource("text", "/text", False, train_split, heldout_split)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "prepared.json", asdict(Prepared(1, KEY, KEY, 0, 32000, (source,))))


def part_of_a_run(directory: Path, *kept: str, **run: Any) -> Path:
    """Of a run of `write_run` only these files, so that few charts are drawn."""
    write_run(directory, **run)
    for path in directory.iterdir():
        if path.name not in ("status.json", "recipe.yaml", *kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return directory


def records(run: Path, name: str) -> list[dict[str, Any]]:
    """Of the training of that name, reports and validations."""
    [path] = run.glob(f"training/{name}-*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_status(directory: Path, state: str, step: str | None, iteration: int | None = None) -> None:
    status = {"schema_version": 1, "state": state, "step": step, "iteration": iteration, "steps": 60, "reason": None}
    write_json(directory / "status.json", {**status, "time": "2026-01-02T03:04:05Z"})


def steps() -> dict[str, dict[str, Any]]:
    """Those of a finished run's manifest.json."""
    names = ("convert", "prepare", "correct", "calibrate", "prune", "distill", "evaluate", "export/hf")
    found = {name: record(MADE.get(name, KEY)) for name in names}
    found["evaluate"]["inputs"] = {name: MADE[step] for name, step in MEASURED.items()} | {"data": KEY}
    return found


def record(output: str = KEY) -> dict[str, Any]:
    ran = {"seconds": 1.5, "processes": 8, "versions": {"minitron_nemo": "0.1.0", "torch": "2.13.0"}}
    return {"key": KEY, "inputs": {}, "settings": {}, "output": output, **ran}


def random_scores(generator: np.random.Generator, teacher: Architecture = TEACHER) -> Scores:
    """Heavy tails, as activations have them; moments of 16 sequences."""

    def moments(*shape: int) -> np.ndarray:
        first = generator.lognormal(0.0, 1.0, (3, *shape))
        return np.stack([16 * first, 16 * first**2 * generator.uniform(1.1, 2.0, first.shape)])

    layers, hidden, experts = teacher.num_layers, teacher.hidden_size, teacher.num_moe_experts or 0
    ffn = (experts, teacher.moe_ffn_hidden_size or 0) if experts else (teacher.ffn_hidden_size,)
    shared = teacher.moe_shared_expert_intermediate_size or 0
    return Scores(
        architecture=teacher,
        hidden=moments(2 * layers, hidden),
        ffn=moments(layers, *ffn),
        heads=moments(layers, teacher.num_attention_heads),
        block_influence=generator.uniform(0.05, 0.5, layers),
        norm_squares=generator.uniform(0.1, 2.0, (2 * layers + 1, hidden)),
        ffn_column_norms=generator.uniform(0.5, 1.0, (layers, *ffn)),
        experts=generator.lognormal(0.0, 0.5, (layers, experts)),
        routed=generator.integers(1000, 9000, (layers, experts)).astype(float),
        shared_expert=moments(layers, shared),
        shared_expert_column_norms=generator.uniform(0.5, 1.0, (layers, shared)),
        sequences=16,
        tokens=32768,
        model_fingerprint=KEY,
        data_fingerprint=KEY,
        settings={"samples": 16, "precision": "fp32", "sequence_length": 2048},
    )


def rotating(source: Architecture, target: Architecture) -> dict[str, Matrix]:
    """The maps of a rotated Plan: new gains, and a matrix in place of the columns of the embedding and every reader."""
    found = {}
    for name, spec, *_ in tensors(target):
        axes = [Axis.HIDDEN in dim.axes for dim in spec.dims]
        if axes == [True]:
            found[name] = Matrix(GAIN, (1, target.hidden_size), KEY)
        if axes == [False, True]:
            found[name] = Matrix(REPLACE, (source.hidden_size, target.hidden_size), KEY)
    return found


def depth_scores(generator: np.random.Generator, teacher: Architecture, kept: Sequence[int]) -> DepthScores:
    """Losses of 16 sequences: without each layer, and with ever fewer layers, as `greedy` tries them."""
    weights = generator.uniform(1000, 2048, 16)
    gone = sorted(set(range(teacher.num_layers)) - set(kept))
    branches = [
        Branch(),
        *(Branch({layer}) for layer in range(teacher.num_layers)),
        *(Branch(gone[:count]) for count in range(2, len(gone) + 1)),
    ]
    sums = {branch: weights * (3.1 + generator.uniform(0.2, 0.4, 16) * len(branch)) for branch in branches}
    sums[Branch(gone[:1])] = weights * (3.1 + generator.uniform(0.1, 0.15, 16))  # the first to go is the cheapest
    identity = {"model_fingerprint": KEY, "data_fingerprint": KEY, "metric": "loss", "precision": "fp32"}
    return DepthScores(teacher, identity, weights, None, sums)


def evaluation(teacher: Architecture, student: Architecture) -> dict[str, dict[str, Any]]:
    """The content of evaluation.json; one of the samples is hostile."""
    found = {}
    losses = {"teacher": 3.1712, "pruned": 3.9871, "distilled": 3.5643, "source": 3.3511}
    for name, loss in losses.items():
        shape = teacher if name in ("teacher", "source") else student
        found[name] = {
            "loss": loss,
            "loss_se": 0.0312,
            "perplexity": float(np.exp(loss)),
            "kl_to_teacher": loss - 3.1712,
            "kl_to_teacher_se": 0.0123,
            "top1_agreement": 1.0 - (loss - 3.1712) / 2,
            "top1_agreement_se": 0.0061,
            "parameters": parameters(shape),
            "non_embedding_parameters": non_embedding_parameters(shape),
            "generation_tokens_per_second": 41.5,
            "generation": [
                {"batch_size": size, "tokens_per_second": 41.5 * size**0.8, "peak_memory_bytes": 2_000_000_000 * size}
                for size in (1, 4, 16)
            ],
            "kl_by_position": [
                {"from": start, "to": stop, "kl": (loss - 3.0) / (1 + part), "se": 0.01}
                for part, (start, stop) in enumerate(zip(EDGES, EDGES[1:], strict=False))
            ],
            "samples": [
                {"prompt": f"The {noun} of a model that was", "continuation": f" {name} is {noun} " * 12}
                for noun in ("size", "speed")
            ]
            + [{"prompt": "How to write", "continuation": HOSTILE if name == "distilled" else "\n\n "}],
        }
    found["pruned"] |= {"delta_vs_teacher": 0.8159, "delta_vs_teacher_se": 0.0198}
    found["distilled"] |= {"delta_vs_teacher": 0.3931, "delta_vs_teacher_se": 0.0152}
    found["distilled"] |= {"delta_vs_pruned": -0.4228, "delta_vs_pruned_se": 0.0131}
    return found


def tasks(evaluation: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of tasks.json."""

    def measured(loss: float) -> dict[str, dict[str, Any]]:
        return {
            "hellaswag": {"acc": {"value": 0.8 - loss / 10, "se": 0.0123}, "acc_norm": {"value": 0.5, "se": None}},
            "lambada_openai": {"perplexity": {"value": 4 * loss, "se": 0.5}, "acc": {"value": 0.6, "se": 0.02}},
        }

    models = {
        name: {
            "fingerprint": MADE[MEASURED[name]],
            "tasks": {
                task: {"metrics": metrics, "by_question": {}} for task, metrics in measured(record["loss"]).items()
            },
        }
        for name, record in evaluation.items()
    }
    return {"schema_version": 1, "models": models}


def candidates() -> list[dict[str, Any]]:
    """After two rungs, of which b and e got the first alone. c is smaller than d, which is faster and better."""
    columns = ("name", "parameters", "steps", "loss", "loss_se", "latency_seconds", "pareto")
    rows = [
        ("a", 61_000_000, 300, 3.91, 0.03, 0.021, True),
        ("d", 76_000_000, 300, 3.60, 0.02, 0.024, True),
        ("c", 74_000_000, 300, 3.72, 0.02, 0.026, True),
        ("b", 70_000_000, 100, 3.95, 0.03, 0.025, False),
        ("e", 59_000_000, 100, 4.21, 0.02, 0.019, True),
    ]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def write_metrics(
    directory: Path, updates: int, generator: np.random.Generator, *, start: float = 5.0, hidden: bool = False
) -> list[dict[str, Any]]:
    """Reports of every update, validations after every tenth and after the last; returns the records."""
    records: list[dict[str, Any]] = []
    for update in range(1, updates + 1):
        ce = 3.3 + (start - 3.3) * np.exp(-update / 15) + generator.normal(0, 0.05)
        logits = (ce - 3.0) if hidden else 0.0
        report = {
            "train/loss": 2 * logits if hidden else ce,
            "train/logits": logits,
            "train/ce": ce,
            "train/lr": 2e-4 * min(1, update / 5) * (1 - update / (updates + 1)),
            "speed/tokens_per_second": generator.uniform(4.0e5, 4.4e5),
            "speed/seconds_per_update": 0.04,
            "memory/peak_allocated_bytes": 3.21e10,
            "train/grad_norm": 0.3 + generator.exponential(0.2),
            "data/tokens": 16384.0 * update,
        }
        if hidden:
            report |= {"train/hidden": 4 * logits, "train/alpha": 0.25}
        records.append({"iteration": update, "time": 1.7e9 + update, **report})
        if update % 10 == 0 or update == updates:
            found = {"validation/loss": ce, "validation/loss_se": 0.04, "validation/perplexity": float(np.exp(ce))}
            if hidden:
                found["validation/kl_to_teacher"] = ce - 3.1
            records.append({"iteration": update, "time": 1.7e9 + update, **found})
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return records
