"""`minitron correct` and `minitron distill`: build the models, train or resume, write the student's weights."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from minitron_nemo.arch import Architecture
from minitron_nemo.checkpoint.fingerprint import fingerprint
from minitron_nemo.config import Recipe, TrainConfig
from minitron_nemo.data.dataset import open_train
from minitron_nemo.data.sampler import Sampler
from minitron_nemo.distillation.cached import Needed, cached_teacher, checked_caches
from minitron_nemo.distillation.intermediate import IntermediateLoss, deliveries, resolve_pairs
from minitron_nemo.distillation.objective import DistillationObjective
from minitron_nemo.distillation.optimizer import ddp_config, params_dtype
from minitron_nemo.distillation.phases import Segment, check_phases, segments, stretches
from minitron_nemo.distillation.schedule import Schedule
from minitron_nemo.distillation.separate import SeparateTeacher, shared_out
from minitron_nemo.distillation.serving import Server
from minitron_nemo.distillation.signals import StopRequest
from minitron_nemo.distillation.teacher import ColocatedTeacher, TeacherSource, colocated_layout
from minitron_nemo.distillation.trainer import Outcome, Trainer
from minitron_nemo.distillation.transfers import Transfers
from minitron_nemo.distillation.validation import Measures, Validation
from minitron_nemo.distillation.watchdog import HEARTBEATS, Heartbeat
from minitron_nemo.errors import UserError
from minitron_nemo.models.build import Model, build_model
from minitron_nemo.models.checkpoint import load_model, load_output_weight, save_model
from minitron_nemo.parallel import launch
from minitron_nemo.parallel.layout import Layout
from minitron_nemo.parallel.worlds import Side, split

# What may differ between the interrupted and the resumed part of a run: where and how it runs, not what it computes.
NEUTRAL = {
    "train": (
        "micro_batch_size",
        "log_interval",
        "eval_interval",
        "peak_flops",
        "save_interval",
        "keep_last",
        "fail_on_save_error",
        "async_save",
        "max_nonfinite_steps",
        "hang_timeout",
        "recompute",
        "overlap_grad_reduce",
        "overlap_param_gather",
    ),
    "distill": ("chunk_bytes",),
}


def train(
    recipe: Recipe,
    *,
    student_dir: Path,
    teacher_dir: Path | None,
    prepared: Path,
    work_dir: Path,
    output_dir: Path,
    run_dir: Path,
    name: str | None = None,
    heldout: Callable[[], Measures] | None = None,
) -> Outcome:
    """Train the model in `student_dir` and write its weights to `output_dir`. Called on every rank of the job.

    With `teacher_dir`: distillation by `recipe.distill` and `recipe.train`. Without: teacher correction (2408.11796
    section 2), cross-entropy with the steps, learning rates and sample order of `recipe.teacher.correction` and the
    rest of `recipe.train`. `work_dir` holds the training checkpoints; where it holds some, the run goes on from the
    latest. "stopped" means a signal came and the state is saved; `output_dir` is not written then. `name` is what
    console and status.json call the step, by default correct or distill. `heldout` gives, once the job has its layout,
    what `train.eval_interval` measures the model with. Raises UserError.

    With `teacher.placement: separate` the job's last processes serve the teacher meanwhile, and return the same.
    """
    student = partial(
        _train,
        recipe,
        student_dir=student_dir,
        teacher_dir=teacher_dir,
        prepared=prepared,
        work_dir=work_dir,
        output_dir=output_dir,
        run_dir=run_dir,
        name=name or ("correct" if teacher_dir is None else "distill"),
        heldout=heldout,
    )
    if teacher_dir is None or recipe.teacher.placement != "separate":
        return student()
    architectures = [Architecture.load(directory) for directory in (teacher_dir, student_dir)]
    worlds = shared_out(recipe, architectures[0], launch.job_size())
    pairs = resolve_pairs(recipe.distill.intermediate, *architectures)
    transfers = worlds.transfers(pairs, *architectures)
    with split(worlds.teacher.processes) as side:
        if side.of_teacher:
            return _serve(recipe, side, transfers, teacher_dir, prepared, run_dir)
        return student(bridge=(side, transfers))


def _serve(
    recipe: Recipe, side: Side, transfers: Transfers, teacher_dir: Path, prepared: Path, run_dir: Path
) -> Outcome:
    """The part of a rank of the teacher's world: until the student's ranks say how the training ended."""
    config = recipe.train
    stop = StopRequest()
    try:
        with stop, Heartbeat(run_dir / HEARTBEATS, config.hang_timeout) as heartbeat:
            launch.initialize(transfers.teacher.layout, config.seed)
            model = _model(teacher_dir, transfers.teacher.layout, config, ddp=False)
            blend = open_train(recipe.data, prepared)
            largest = _largest(segments(config, blend.sequence_length))
            server = Server(
                side,
                transfers,
                model,
                Sampler(blend, recipe.data.seed, stretches(config, blend)),
                sequence_length=largest.sequence_length,
                micro_batch_size=largest.micro_batch_size,
                buffer_bytes=recipe.teacher.buffer_bytes,
            )
            return server.serve(stop, heartbeat)
    except RuntimeError:
        if stop.received:  # it may have ended the student's ranks before their training began, which would save first
            signal.raise_signal(stop.received)
        raise


def _train(
    recipe: Recipe,
    *,
    student_dir: Path,
    teacher_dir: Path | None,
    prepared: Path,
    work_dir: Path,
    output_dir: Path,
    run_dir: Path,
    name: str,
    heldout: Callable[[], Measures] | None,
    bridge: tuple[Side, Transfers] | None = None,
) -> Outcome:
    """`train` on a rank of the student's world; `bridge` leads to a teacher in another one."""
    correcting = teacher_dir is None
    config = correction_config(recipe) if correcting else recipe.train
    data = replace(recipe.data, seed=recipe.teacher.correction.seed) if correcting else recipe.data
    section = "teacher.correction" if correcting else "train"
    Schedule.from_config(config).check(section)
    layout = Layout.from_config(recipe.parallel)
    longest = Architecture.load(student_dir).max_position_embeddings
    check_phases(config, data, layout, launch.world_size(), longest, section)
    objective = DistillationObjective.from_config(recipe.distill)
    caches: list[Needed] = []
    if teacher_dir is not None:
        layout.check_split("student", Architecture.load(student_dir).num_layers)
    if teacher_dir is not None and objective.needs_teacher:
        _check_vocabularies(student_dir, teacher_dir)
        if recipe.teacher.placement == "cached":
            caches = checked_caches(recipe, teacher_dir, prepared)
    launch.initialize(layout, config.seed)
    student = _model(student_dir, layout, config, ddp=True)
    teacher: TeacherSource | None = None
    intermediate = None
    if teacher_dir is None:
        objective = DistillationObjective.cross_entropy(recipe.distill.chunk_bytes)
    elif caches:
        teacher = cached_teacher(recipe, caches, layout)
    elif objective.needs_teacher:
        architecture = Architecture.load(teacher_dir)
        pairs = resolve_pairs(recipe.distill.intermediate, architecture, student.architecture)
        if pairs:
            intermediate = IntermediateLoss(student, architecture, pairs, recipe.distill.intermediate, config.seed)
        run = segments(config, data.sequence_length)
        if bridge is not None:
            dtype = params_dtype(config)
            weight = None if student.output_layer is None else load_output_weight(teacher_dir, layout, dtype)
            teacher = SeparateTeacher(
                *bridge, architecture, run, dtype=dtype, output_weight=weight, buffer_bytes=recipe.teacher.buffer_bytes
            )
        else:
            teacher_layout = colocated_layout(recipe.teacher, architecture, layout, launch.world_size())
            model = _model(teacher_dir, teacher_layout, config, ddp=False)
            largest = _largest(run)
            teacher = ColocatedTeacher(
                model,
                sequence_length=largest.sequence_length,
                micro_batch_size=largest.micro_batch_size,
                buffer_bytes=recipe.teacher.buffer_bytes,
                student_layout=layout,
                deliveries=deliveries(pairs, model, student),
            )
    blend = open_train(data, prepared)
    colocated = teacher if isinstance(teacher, ColocatedTeacher) else None
    validation = None
    if heldout is not None and config.eval_interval:
        validation = Validation(heldout(), student, colocated, config.eval_interval)
    trainer = Trainer(
        config,
        objective,
        student,
        teacher,
        Sampler(blend, data.seed, stretches(config, blend)),
        directory=work_dir,
        run_dir=run_dir,
        name=name,
        settings={
            **_settings("train", config),
            **_settings("distill", recipe.distill if teacher_dir else objective),
            "data.separator_weight": data.separator_weight,  # the rest of the data the sampler's state vouches for
            "student": launch.from_rank_0(lambda: fingerprint(student_dir)),
            "teacher": None if teacher_dir is None else launch.from_rank_0(lambda: fingerprint(teacher_dir)),
            **({"teacher.cache": [asdict(each.identity) for each in caches]} if caches else {}),
        },
        intermediate=intermediate,
        ce_weight=None if teacher_dir is None else recipe.distill.ce_weight,
        teacher_architecture=colocated.model.architecture if colocated else None,
        validation=validation,
    )
    outcome = trainer.run()
    if isinstance(teacher, SeparateTeacher):
        teacher.close(outcome)
    if outcome == "done":
        save_model(student, output_dir, tokenizer_from=student_dir)
    return outcome


def correction_config(recipe: Recipe) -> TrainConfig:
    """`recipe.train` with the schedule of the teacher correction: one phase of `data.sequence_length`."""
    correction = recipe.teacher.correction
    return replace(
        recipe.train,
        steps=correction.steps,
        global_batch_size=correction.global_batch_size or recipe.train.global_batch_size,
        lr=correction.lr,
        min_lr=correction.min_lr,
        warmup_steps=correction.warmup_steps,
        lr_decay_style=correction.lr_decay_style,
        lr_wsd_decay_steps=correction.lr_wsd_decay_steps,
        phases=[],
        rampup_batch_size=None,
    )


def _model(directory: Path, layout: Layout, config: TrainConfig, ddp: bool) -> Model:
    architecture = Architecture.load(directory)
    layout.check(architecture, launch.world_size())
    model = build_model(
        architecture,
        layout,
        dtype=params_dtype(config),
        ddp=ddp_config(config) if ddp else None,
        recompute=config.recompute and ddp,
    )
    load_model(model, directory)
    return model


def _largest(run: Sequence[Segment]) -> Segment:
    """The one whose microbatches have the most tokens."""
    return max(run, key=lambda segment: segment.micro_batch_size * segment.sequence_length)


def _check_vocabularies(student_dir: Path, teacher_dir: Path) -> None:
    own, wanted = (Architecture.load(path).vocab_size for path in (student_dir, teacher_dir))
    if own != wanted:
        raise UserError(
            f"{student_dir}: vocab_size {own} is not the {wanted} of {teacher_dir}; teacher and student must share "
            "the tokenizer"
        )


def _settings(section: str, values: Any) -> dict[str, Any]:
    """A section's keys as the recipe spells them, as JSON stores them, without the neutral ones."""
    neutral = NEUTRAL.get(section, ())
    kept = {f"{section}.{key}": value for key, value in asdict(values).items() if key not in neutral}
    if section == "train":
        kept["train.phases"] = [{**phase, "micro_batch_size": None} for phase in kept["train.phases"]]
    stored: dict[str, Any] = json.loads(json.dumps(kept))
    return stored
