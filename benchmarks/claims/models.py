"""The two models on which the claims are tried, with the shapes and the settings of all their cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.bench import DISTILLATION, SHAPES

Shape = tuple[int, int, int]  # hidden_size, ffn_hidden_size, num_layers


@dataclass(frozen=True)
class Setting:
    """`overrides` of the quickstart's recipe, `scratch` of trainings from random weights besides; `steps` of each cell.

    `main` is cut in width alone. Each of `equal` names a shape cut in width and one cut in depth, of as many parameters
    without embeddings within a percent; `deep` is the shape on which the losses of intermediate states are tried.
    """

    name: str
    title: str
    shapes: Mapping[str, Shape]
    main: str
    equal: tuple[tuple[str, str], ...]
    deep: str
    overrides: tuple[str, ...]
    scratch: tuple[str, ...]
    steps: int
    tokens: int  # of a step
    scratch_steps: int  # from random weights, to see how many tokens they take; the small teacher's, too
    samples: int
    documents: int
    correction: bool  # whether its teacher has not been trained on the text, so that correcting it means something


SMALL = Setting(
    name="small",
    title="small, 3.1 M",
    shapes={
        "width 1/2": (144, 284, 6),
        "depth 1/2": (192, 512, 3),
        "width 2/3": (160, 375, 6),
        "depth 2/3": (192, 512, 4),
    },
    main="width 1/2",
    equal=(("width 1/2", "depth 1/2"), ("width 2/3", "depth 2/3")),
    deep="depth 1/2",
    overrides=(
        "data.sequence_length=128",
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        "train.lr=1e-3",
        "train.min_lr=1e-4",
        "train.precision=fp32",
        "train.log_interval=20",
        "train.save_interval=100",
        "parallel.pipeline_model_parallel_size=1",
        "prune.calibration.precision=fp32",
        "evaluate.documents=128",
        "evaluate.micro_batch_size=4",
    ),
    scratch=("train.lr=3e-3", "train.min_lr=3e-4", "train.warmup_steps=10"),
    steps=60,
    tokens=2048,
    scratch_steps=700,
    samples=256,
    documents=128,
    correction=False,
)

SMOLLM2 = Setting(
    name="smollm2",
    title="SmolLM2-135M",
    shapes={"width 2/3": SHAPES["mixed 2/3"], "depth 2/3": SHAPES["depth 2/3"]},
    main="width 2/3",
    equal=(("width 2/3", "depth 2/3"),),
    deep="depth 2/3",
    overrides=DISTILLATION,
    scratch=("train.lr=1e-3", "train.min_lr=1e-4"),
    steps=20,
    tokens=512,
    scratch_steps=400,
    samples=64,
    documents=32,
    correction=True,
)
SETTINGS = {setting.name: setting for setting in (SMALL, SMOLLM2)}
