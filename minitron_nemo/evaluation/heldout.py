"""The held-out documents, ready to measure a model that is being trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_nemo.config import Recipe
from minitron_nemo.data.dataset import open_heldout
from minitron_nemo.evaluation.checks import has_colocated_teacher
from minitron_nemo.evaluation.documents import TeacherStates, check_layout, document_sums, share
from minitron_nemo.evaluation.evaluate import Measured
from minitron_nemo.evaluation.report import summarise
from minitron_nemo.models.build import Model
from minitron_nemo.parallel.layout import Layout

METRICS = ("loss", "loss_se", "perplexity")
AGAINST_TEACHER = ("kl_to_teacher", "top1_agreement")


class HeldOut:
    """Measures models on documents as `evaluate` does. `batches` is this data-parallel rank's share of them."""

    def __init__(
        self, documents: Sequence[Mapping[str, Any]], layout: Layout, micro_batch_size: int = 1, compared: bool = False
    ) -> None:
        """`launch.initialize(layout, ...)` must have been called. Raises UserError for a layout that does not fit.

        `compared`: with a teacher on these ranks.
        """
        check_layout(layout, len(documents[0]["tokens"]), compared)
        self.documents = len(documents)
        self.batches = share(documents, micro_batch_size)

    @staticmethod
    def from_recipe(recipe: Recipe, prepared: Path, layout: Layout) -> HeldOut:
        """The documents that `minitron evaluate` takes. Raises UserError if nothing was held out."""
        config = recipe.evaluate
        length = config.sequence_length or recipe.data.sequence_length
        documents = open_heldout(prepared, length, config.documents, recipe.data.separator_weight)
        return HeldOut(documents, layout, config.micro_batch_size, has_colocated_teacher(recipe))

    def measure(
        self, model: Model, teacher_states: Iterable[Tensor] | None, output_weight: Tensor | None
    ) -> dict[str, float]:
        """Figures of evaluation.json, under its names, the same on every rank. Collective; leaves the model as it is.

        The teacher, on the last pipeline stage: states [s(/tp) * b, h] of every microbatch and output weight
        [padded_vocab/tp, h]. None as states: there is no teacher, and nothing is compared with it.
        """
        teacher = None if teacher_states is None else TeacherStates(teacher_states, output_weight)
        sums = document_sums(model, teacher, self.batches, self.documents)
        record = summarise({"model": Measured(**vars(sums), architecture=model.architecture)})["model"]
        names = METRICS if teacher is None else METRICS + AGAINST_TEACHER
        return {name: float(value) for name in names if (value := record[name]) is not None}
