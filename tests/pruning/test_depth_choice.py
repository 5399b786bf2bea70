"""The choice by given costs, against all sets there are; the file; what is planned. No model runs here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from minitron_nemo.config import DepthConfig, PruneConfig
from minitron_nemo.data.choices import Choices
from minitron_nemo.errors import UserError
from minitron_nemo.models.branches import Branch, Branches
from minitron_nemo.pruning.depth import check_depth, choose, flops_per_token, grouped, planned, summary, wanted
from minitron_nemo.pruning.depth_scores import DepthScores
from minitron_nemo.pruning.plan import make_plan
from tests.importance.synthetic import architecture, random_values, scores_from

LAYERS = 6
SEQUENCES = 4


def measured(method: str, drop: int, loss: Callable[[Branch], float], normalize: bool = False) -> DepthScores:
    """Scores for which `loss` was measured as `wanted` asks for it."""
    scores = DepthScores(architecture(num_layers=LAYERS), {}, np.ones(SEQUENCES))
    while branches := wanted(scores, method, drop, normalize):
        for branch in branches:
            scores.add(branch, range(SEQUENCES), np.full(SEQUENCES, loss(branch)))
    return scores


def random_loss(seed: int) -> Callable[[Branch], float]:
    """A loss for each of the 2^6 sets of layers."""
    losses = np.random.default_rng(seed).uniform(2, 5, 2**LAYERS)
    return lambda branch: float(losses[sum(1 << layer for layer in branch)])


def best(branches: Sequence[Branch], loss: Callable[[Branch], float]) -> Branch:
    return min(branches, key=loss)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drop", [1, 2, 3, 5, 6])
def test_every_method_drops_what_trying_its_sets_finds(seed: int, drop: int) -> None:
    loss = random_loss(seed)
    dropped, _ = choose(measured("leave_one_out", drop, loss), "leave_one_out", drop, False)
    alone = {layer: loss(Branch({layer})) for layer in range(LAYERS)}
    assert dropped == min(
        map(Branch, combinations(range(LAYERS), drop)), key=lambda b: sum(alone[layer] for layer in b)
    )
    dropped, _ = choose(measured("best_block", drop, loss), "best_block", drop, False)
    assert dropped == best([Branch(range(start, start + drop)) for start in range(LAYERS - drop + 1)], loss)
    dropped, _ = choose(measured("greedy", drop, loss), "greedy", drop, False)
    one_by_one = Branch()
    for _ in range(drop):
        one_by_one = best([one_by_one | {layer} for layer in range(LAYERS) if layer not in one_by_one], loss)
    assert dropped == one_by_one


def test_the_gap_is_the_closest_decisions() -> None:
    loss = random_loss(0)
    single = sorted(loss(Branch({layer})) for layer in range(LAYERS))
    _, gap = choose(measured("leave_one_out", 2, loss), "leave_one_out", 2, False)
    assert gap == pytest.approx((single[2] - single[1]) / single[2])
    scores = measured("greedy", 2, loss)
    first = choose(scores, "greedy", 1, False)
    second = sorted(loss(first[0] | {layer}) for layer in range(LAYERS) if layer not in first[0])
    assert first[1] == pytest.approx((single[1] - single[0]) / single[1])
    assert choose(scores, "greedy", 2, False)[1] == pytest.approx(min(first[1], (second[1] - second[0]) / second[1]))
    assert choose(measured("best_block", LAYERS, loss), "best_block", LAYERS, False)[1] == 0.0  # nothing to choose


@pytest.mark.parametrize("method", ["leave_one_out", "greedy", "best_block"])
def test_ties_go_to_the_higher_layers(method: str) -> None:
    assert choose(measured(method, 2, lambda branch: 3.0), method, 2, False) == (Branch({4, 5}), 0.0)


def test_leave_one_out_serves_every_depth_and_greedy_every_smaller_one() -> None:
    assert wanted(measured("leave_one_out", 1, random_loss(0)), "leave_one_out", 4, False) == []
    greedy = measured("greedy", 3, random_loss(0))
    assert wanted(greedy, "greedy", 2, False) == []
    assert len(wanted(greedy, "greedy", 4, False)) == LAYERS - 3
    with pytest.raises(UserError, match="not measured for greedy of 4 layers; run `minitron score-depth` again"):
        choose(greedy, "greedy", 4, False)


def test_a_task_is_won_by_accuracy_then_by_margin() -> None:
    """Two questions of two choices; sums are minus log-probabilities."""
    choices = Choices(np.array([2, 2]), np.array([0, 1]), np.array([1, 1, 1, 8]))
    scores = DepthScores(architecture(num_layers=2), {}, np.ones(4), choices)
    scores.add(Branch(), range(4), np.array([1.0, 2.0, 2.0, 1.0]))
    scores.add(Branch({0}), range(4), np.array([1.0, 2.0, 2.0, 1.5]))  # both right, margins 1 and 0.5
    scores.add(Branch({1}), range(4), np.array([1.0, 9.0, 2.0, 2.5]))  # one right, margins 8 and -0.5
    assert scores.cost(Branch({0})) == (-1.0, -0.75)
    assert scores.cost(Branch({1})) == (-0.5, -3.75)
    assert choose(scores, "leave_one_out", 1, False) == (Branch({0}), 0.5)
    scores.sums[Branch({1})][3] = 1.0  # both right now: the margin decides
    assert choose(scores, "leave_one_out", 1, False)[0] == {1}
    # By character the last choice, of eight, is likely all the same.
    scores.sums[Branch({1})][3] = 2.5
    assert scores.cost(Branch({1}), normalize=True)[0] == -1.0
    assert "accuracy 100.0%, without them 100.0%" in summary(scores, "leave_one_out", 1, False)


def test_the_increase_has_a_paired_standard_error() -> None:
    scores = DepthScores(architecture(num_layers=2), {}, np.full(3, 2.0))
    scores.add(Branch(), range(3), np.array([2.0, 4.0, 9.0]))
    scores.add(Branch({1}), range(3), np.array([4.0, 5.0, 12.0]))
    mean, error = scores.increase(Branch({1}))
    per_token = np.array([1.0, 0.5, 1.5])  # of each sequence of weight 2
    assert mean == pytest.approx(per_token.mean())
    assert error == pytest.approx(per_token.std(ddof=1) / np.sqrt(3))


def test_a_plan_keeps_the_layers_that_are_not_chosen_and_says_what_chose_them() -> None:
    shape = architecture(num_layers=LAYERS)
    calibrated = scores_from(random_values(shape), shape)
    scores = measured("best_block", 2, random_loss(1))
    dropped, gap = choose(scores, "best_block", 2, False)
    config = PruneConfig(num_layers=4, depth_method="best_block")
    made = make_plan(calibrated, shape, config, scores)
    assert set(range(LAYERS)) - set(made.kept_layers) == dropped
    assert made.gaps["num_layers"] == gap and made.provenance["depth_method"] == "best_block"
    with pytest.raises(UserError, match="best_block needs depth scores; run `minitron score-depth`"):
        make_plan(calibrated, shape, config)
    scores.architecture = architecture(num_layers=LAYERS, hidden_size=16)
    with pytest.raises(UserError, match="depth scores: measured on a model with hidden_size 16"):
        make_plan(calibrated, shape, config, scores)


def test_scores_are_read_as_they_were_written_finished_or_not(tmp_path: Path) -> None:
    choices = Choices(np.array([2]), np.array([1]), np.array([3, 4]))
    scores = DepthScores(architecture(num_layers=2), {"metric": "task"}, np.array([1.0, 2.0]), choices)
    scores.add(Branch(), [0, 1], np.array([1.5, 2.5]))
    scores.add(Branch({1}), [1], np.array([0.1]))
    scores.save(tmp_path / "depth.npz")
    read = DepthScores.load(tmp_path / "depth.npz")
    assert (read.architecture, read.identity) == (scores.architecture, scores.identity)
    np.testing.assert_array_equal(read.weights, scores.weights)
    assert read.sums.keys() == scores.sums.keys()
    np.testing.assert_array_equal(read.sums[Branch({1})], [np.nan, 0.1])
    assert read.missing(Branch({1})).tolist() == [True, False] and read.missing(Branch({0})).all()
    assert read.cost(Branch()) == scores.cost(Branch())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY"])
def test_a_file_that_is_none_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "depth.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"depth\.npz: not depth scores .*; remove it") as error:
        DepthScores.load(tmp_path / "depth.npz")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"nothing\.npz: not there; run `minitron score-depth` first"):
        DepthScores.load(tmp_path / "nothing.npz")


def test_a_loss_that_is_not_finite_is_refused_by_its_layers() -> None:
    scores = DepthScores(architecture(num_layers=2), {}, np.ones(1))
    with pytest.raises(UserError, match=r"the loss without layers \[1\] is not finite"):
        scores.add(Branch({1}), [0], np.array([np.nan]))


def test_costs_are_planned_as_they_are_counted() -> None:
    shape = architecture(num_layers=32)
    assert planned(shape, "leave_one_out", [16], most=100) == (33, 32 * 33 // 2)
    # 17 starts: the states before them once, 16 - start layers behind each; and the rest of the whole model.
    assert planned(shape, "best_block", [16], most=100) == (18, 32 + sum(16 - start for start in range(17)))
    # The second round has 31 layers left, and no whole model to measure: 30 of its layers before the last one branches.
    assert planned(shape, "greedy", [2], most=100) == (33 + 31, 32 * 33 // 2 + 31 * 30 // 2 + 30)
    assert planned(shape, "leave_one_out", [16], most=1) == (33, 32 * 32)
    # Two groups: the first has the plain states of its 16 layers once more.
    assert planned(shape, "leave_one_out", [16], most=17)[1] == 32 * 33 // 2 + 15


@pytest.mark.parametrize("method", ["leave_one_out", "greedy", "best_block"])
@pytest.mark.parametrize("most", [3, 100])
def test_several_depths_are_planned_as_they_are_measured_one_after_the_other(method: str, most: int) -> None:
    """Into one file, in which what an earlier depth has measured is not asked for again."""
    scores, models, evaluations = DepthScores(architecture(num_layers=LAYERS), {}, np.ones(SEQUENCES)), 0, 0
    loss = random_loss(0)
    for drop in (4, 3, 1):
        while branches := wanted(scores, method, drop, False):
            models += len(branches)
            evaluations += sum(Branches(group, LAYERS).evaluations for group in grouped(branches, most, LAYERS))
            for branch in branches:
                scores.add(branch, range(SEQUENCES), np.full(SEQUENCES, loss(branch)))
    assert planned(scores.architecture, method, [1, 4, 3], most) == (models, evaluations)
    alone = sum(planned(scores.architecture, method, [drop], most)[0] for drop in (4, 3, 1))
    assert models < alone == {"leave_one_out": 21, "greedy": 42, "best_block": 16}[method]


def test_groups_are_even_and_hold_what_is_alike() -> None:
    branches = [Branch(), *(Branch({layer}) for layer in range(6))]
    assert grouped(branches, 3, 6) == [
        [Branch({0}), Branch({1})],
        [Branch({2}), Branch({3})],
        [Branch({4}), Branch({5}), Branch()],
    ]


def test_flops_are_those_of_layers_and_outputs() -> None:
    shape = architecture(num_layers=4)
    whole = flops_per_token(shape, 32, models=1, evaluations=4)
    output = 2 * shape.vocab_size * shape.hidden_size
    assert flops_per_token(shape, 32, models=5, evaluations=10) == (whole - output) * 10 // 4 + 5 * output


@pytest.mark.parametrize(
    "config, message",
    [
        (DepthConfig(metric="task"), r"prune\.depth\.task: metric task needs one"),
        (DepthConfig(task="a.jsonl"), r"prune\.depth\.task: a\.jsonl is not looked at by metric loss"),
        (DepthConfig(metric="task", task="/nowhere.jsonl"), r"prune\.depth\.task: /nowhere\.jsonl: not readable"),
    ],
)
def test_a_metric_and_its_task_come_together(config: DepthConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_depth(config)
