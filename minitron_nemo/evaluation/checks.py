"""Whether the models of a recipe can be evaluated on its layout, and validated: said before anything runs."""

from __future__ import annotations

from minitron_nemo.config import Recipe
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.documents import check_length
from minitron_nemo.parallel.layout import Layout


def has_colocated_teacher(recipe: Recipe) -> bool:
    """Whether a validation compares the student with a teacher on its ranks."""
    distils = recipe.train.steps > 0 and recipe.distill.logits_weight != 0
    return distils and recipe.train.eval_interval > 0 and recipe.teacher.placement == "colocated"


def check_evaluation(recipe: Recipe, layout: Layout, max_position_embeddings: int) -> None:
    """Raise UserError, naming the key, for documents longer than the models were trained on, or than `layout` takes."""
    length = recipe.evaluate.sequence_length or recipe.data.sequence_length
    if length > max_position_embeddings:
        raise UserError(
            f"evaluate.sequence_length: {length} is longer than the model's max_position_embeddings "
            f"{max_position_embeddings}; shorten it"
        )
    check_length(layout, length, has_colocated_teacher(recipe))
    trains = recipe.train.steps or recipe.teacher.correction.steps
    if layout.context_parallel_size > 1 and trains and recipe.train.eval_interval:
        raise UserError(
            f"train.eval_interval: {recipe.train.eval_interval} asks for validations, which do not go with "
            "parallel.context_parallel_size above 1; set it to 0"
        )


def evaluation_warnings(layout: Layout) -> list[str]:
    """What of a chain does not run on this layout, as sentences for a person."""
    size = layout.context_parallel_size
    if size == 1:
        return []
    return [
        f"parallel.context_parallel_size: {size} is for trainings, and calibration, evaluation and whatever else "
        "measures a model refuse it: run `minitron distill` alone with it, and all before and after with 1"
    ]
