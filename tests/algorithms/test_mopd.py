"""MOPD and CaMOPD end to end: from log-probabilities to token weights, loss and gradient.

The worked examples W3 and W4 were computed by hand from the papers' formulas.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megadistill.algorithms import Mopd, Selection
from megadistill.types import FloatArray, Sample, Scored, TopK
from tests.tiny import Tree, camopd_tree, decisions, float32, make_scored

W3 = (
    make_scored([-0.5, -1, -2], [-0.2, -1.5, -0.5], rollout_R=[-0.6, -1, -1], prompt_id="one"),
    make_scored([-0.7, -0.2], [-0.3, -0.9], prompt_id="two"),
)


def make_mopd(batch_size: int = 2, general_share: float = 0.5, **settings: Any) -> Mopd:
    algorithm = {
        "kind": "mopd",
        "general": {"pool": "general", "teacher": "general"},
        "domain": {"pool": "medical", "teacher": "domain"},
        "general_share": general_share,
        **settings,
    }
    return made(camopd_tree(algorithm=algorithm, batch={"size": batch_size}))


def make_camopd(
    general: Tree | None = None, domain: Tree | None = None, schedule: Tree | None = None
) -> Mopd:
    tree = camopd_tree(batch={"size": 2})
    tree["algorithm"]["general"] |= general or {}
    tree["algorithm"]["domain"] |= domain or {}
    tree["algorithm"]["schedule"] = schedule or {}
    return made(tree)


def made(tree: Tree) -> Mopd:
    algorithm = decisions(tree)
    assert isinstance(algorithm, Mopd)
    return algorithm


def loss_of(selection: Selection, scored: Sequence[Scored]) -> float:
    """-sum weight x log pi, as the trainer computes it, in double precision."""
    total = 0.0
    for index, sample in zip(selection.selected, selection.samples, strict=True):
        logprobs_R = scored[index].student_logprobs_R.astype(np.float64)
        total -= float((sample.weights_R * logprobs_R).sum())
    return total


def random_batch(
    seed: int, branch: str = "general", size: int = 8, noise: float = 0.3
) -> list[Scored]:
    """Rollouts of different lengths; the rollout engine differs a little from the trainer."""
    generator = np.random.default_rng(seed)
    batch = []
    for index in range(size):
        length = int(generator.integers(1, 9))
        student_R = -generator.exponential(1.0, length)
        batch.append(
            make_scored(
                student_R.tolist(),
                (student_R + generator.normal(0, 1, length)).tolist(),
                rollout_R=(student_R + generator.normal(0, noise, length)).tolist(),
                branch=branch,
                prompt_id=f"p{index}",
            )
        )
    return batch


def test_vanilla_loss_is_that_of_the_worked_example() -> None:
    selection = make_mopd().select(W3)
    assert loss_of(selection, W3) == pytest.approx(-0.020704, abs=1e-6)


def test_token_weights_are_those_of_the_worked_example() -> None:
    first, second = make_mopd().select(W3).samples
    np.testing.assert_allclose(first.weights_R, [0.055259, -0.083333, 0.0], atol=1e-6)
    np.testing.assert_allclose(second.weights_R, [0.1, -0.175], atol=1e-6)


def test_camopd_loss_is_that_of_the_worked_example() -> None:
    selection = make_camopd(general={"mass": 0.5, "scale": 2}).select(W3)
    assert selection.selected == [0]
    np.testing.assert_allclose(list(selection.scores.values()), [0.766667, 0.55], atol=1e-6)
    assert loss_of(selection, W3) == pytest.approx(-0.222816, abs=1e-6)


def test_the_misreadings_are_what_they_are_called() -> None:
    """Three wrong formulas give other numbers on W3, so that the right one there tells them apart."""
    student = [item.student_logprobs_R.astype(np.float64) for item in W3]
    gap = [item.gap_R.astype(np.float64) for item in W3]
    ratio = [np.exp(own - item.rollout.logprobs_R) for own, item in zip(student, W3, strict=True)]
    masked = [np.where((r >= 0.5) & (r <= 2), r, 0) for r in ratio]
    terms = [w * a * p for w, a, p in zip(masked, gap, student, strict=True)]
    clamped = [np.clip(r, 0.5, 2) * a * p for r, a, p in zip(ratio, gap, student, strict=True)]
    token_mean = -np.concatenate(terms).mean()
    valid_mean = -np.mean([t.sum() / (w > 0).sum() for t, w in zip(terms, masked, strict=True)])
    clamp = -np.mean([t.mean() for t in clamped])
    np.testing.assert_allclose(
        [token_mean, valid_mean, clamp], [-0.038845, -0.048556, 0.229296], atol=1e-6
    )


def test_gap_statistics_follow_the_on_policy_identity() -> None:
    """Ten tokens in the student's proportions: token means are expectations (W4)."""
    student, teacher = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
    tokens = [0] * 5 + [1] * 3 + [2] * 2
    item = make_scored(
        [float(np.log(student[token])) for token in tokens],
        [float(np.log(teacher[token])) for token in tokens],
    )
    metrics = make_mopd().select([item]).metrics
    assert metrics["general/gap_exp"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["general/gap"] == pytest.approx(-0.223805, abs=1e-6)
    assert metrics["general/gap_absolute"] == pytest.approx(0.692486, abs=1e-5)
    assert metrics["general/gap_positive"] == pytest.approx(0.234341, abs=1e-6)


def test_autograd_of_the_loss_is_the_closed_form() -> None:
    """d loss / d log pi(y_t) = -(1/N) (1/T_i) w_t A_t, through a real softmax and back."""
    batch, logits_by_item = softmax_batch(seed=3)
    weights = [torch.from_numpy(sample.weights_R) for sample in make_mopd().select(batch).samples]
    found = gradients(batch, logits_by_item, weights)
    for item, logits_RV, gradient_RV in zip(batch, logits_by_item, found, strict=True):
        expected_RV = closed_form(item, logits_RV, len(batch))
        np.testing.assert_allclose(gradient_RV, expected_RV, atol=1e-7)


def test_neither_importance_weight_nor_advantage_carries_gradient() -> None:
    """Gradient through w and A would be another gradient; ours is that of constant weights."""
    batch, logits_by_item = softmax_batch(seed=4)
    ours = [torch.from_numpy(sample.weights_R) for sample in make_mopd().select(batch).samples]
    attached = []
    for item, logits_RV in zip(batch, logits_by_item, strict=True):
        logprobs_R = chosen(logits_RV, item)
        ratio_R = (logprobs_R - torch.from_numpy(item.rollout.logprobs_R)).exp()
        gap_R = torch.from_numpy(item.teacher_logprobs_R) - logprobs_R
        attached.append(ratio_R * gap_R / (len(batch) * len(gap_R)))
    for weights_R, attached_R in zip(ours, attached, strict=True):
        torch.testing.assert_close(weights_R.double(), attached_R.detach(), atol=1e-6, rtol=0)
    found = gradients(batch, logits_by_item, ours)
    wrong = gradients(batch, logits_by_item, attached)
    assert max(float((a - b).abs().max()) for a, b in zip(found, wrong, strict=True)) > 0.01


def gradients(
    batch: Sequence[Scored], logits: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Gradient of -sum weight x log pi with respect to each item's logits."""
    items = zip(batch, logits, weights, strict=True)
    terms = [(weights_R * chosen(own, item)).sum() for item, own, weights_R in items]
    return list(torch.autograd.grad(-torch.stack(terms).sum(), list(logits)))


def softmax_batch(seed: int) -> tuple[list[Scored], list[torch.Tensor]]:
    """Three rollouts over five tokens, with the logits that the student's log-probs come from."""
    generator = torch.Generator().manual_seed(seed)
    batch, logits_by_item = [], []
    for length in (1, 3, 4):
        logits_RV = torch.randn(length, 5, generator=generator, dtype=torch.float64)
        teacher_RV = torch.randn(length, 5, generator=generator, dtype=torch.float64)
        tokens_R = torch.arange(length) % 5
        student_R = logits_RV.log_softmax(-1)[range(length), tokens_R]
        teacher_R = teacher_RV.log_softmax(-1)[range(length), tokens_R]
        rollout_R = student_R + 0.1 * torch.randn(length, generator=generator)
        item = make_scored(student_R.tolist(), teacher_R.tolist(), rollout_R=rollout_R.tolist())
        batch.append(item)
        logits_by_item.append(logits_RV.requires_grad_())
    return batch, logits_by_item


def chosen(logits_RV: torch.Tensor, item: Scored) -> torch.Tensor:
    """log pi of the item's tokens, which are 0, 1, 2, ... modulo the vocabulary."""
    length = len(item.gap_R)
    return logits_RV.log_softmax(-1)[range(length), torch.arange(length) % 5]


def closed_form(item: Scored, logits_RV: torch.Tensor, num_samples: int) -> FloatArray:
    """The gradient with respect to the logits, from the formula and nothing of ours."""
    length = len(item.gap_R)
    ratio_R = np.exp(item.student_logprobs_R.astype(float) - item.rollout.logprobs_R)
    gap_R = item.teacher_logprobs_R.astype(float) - item.student_logprobs_R
    by_logprob_R = -ratio_R * gap_R / (num_samples * length)
    softmax_RV = logits_RV.detach().softmax(-1).numpy()
    one_hot_RV = np.eye(5)[np.arange(length) % 5]
    return float32(by_logprob_R[:, None] * (one_hot_RV - softmax_RV))


@pytest.mark.parametrize(
    ("num_general", "general_steps", "domain_steps"), [(1, 60, 60), (3, 90, 30), (5, 100, 20)]
)
def test_schedules_have_their_counts_and_order(
    num_general: int, general_steps: int, domain_steps: int
) -> None:
    algorithm = make_camopd(schedule={"general": num_general, "domain": 1})
    branches = [next(iter(algorithm.draws(step))) for step in range(120)]
    assert branches.count("general") == general_steps
    assert branches.count("domain") == domain_steps
    for step, branch in enumerate(branches):
        expected = "general" if step % (num_general + 1) < num_general else "domain"
        assert branch == expected, step


def test_the_default_schedule_is_three_to_one() -> None:
    branches = [next(iter(make_camopd().draws(step))) for step in range(5)]
    assert branches == ["general", "general", "general", "domain", "general"]


def test_a_camopd_step_draws_the_whole_batch_from_one_branch() -> None:
    algorithm = make_camopd()
    assert [dict(algorithm.draws(step)) for step in (0, 3)] == [{"general": 2}, {"domain": 2}]


@pytest.mark.parametrize(
    ("share", "draws"),
    [
        (0.5, {"general": 256, "domain": 256}),
        (0.75, {"general": 384, "domain": 128}),
        (1.0, {"general": 512}),
    ],
)
def test_a_mixed_step_draws_from_both_branches(share: float, draws: dict[str, int]) -> None:
    algorithm = make_mopd(batch_size=512, general_share=share)
    assert all(dict(algorithm.draws(step)) == draws for step in (0, 1, 7))


def test_equal_models_have_no_domain_score_and_no_weight() -> None:
    batch = [
        make_scored(
            item.student_logprobs_R.tolist(),
            item.student_logprobs_R.tolist(),
            rollout_R=item.rollout.logprobs_R.tolist(),
            branch="domain",
        )
        for item in random_batch(5)
    ]
    selection = make_camopd().select(batch)
    assert set(selection.scores.values()) == {0.0}
    assert all(not sample.weights_R.any() for sample in selection.samples)
    assert selection.metrics["domain/selected_fraction"] == 1.0


def test_noise_between_two_engines_becomes_a_domain_score() -> None:
    """Why student and teacher must run through the same code: the noise would be selected on."""
    generator = np.random.default_rng(6)
    batch = [
        make_scored(
            (student := -generator.exponential(1.0, 20)).tolist(),
            (student + generator.normal(0, 1e-2, 20)).tolist(),
            branch="domain",
        )
        for _ in range(16)
    ]
    selection = make_camopd().select(batch)
    assert min(selection.scores.values()) > 0
    assert selection.metrics["domain/selected_fraction"] < 1
    assert any(sample.weights_R.any() for sample in selection.samples)


@pytest.mark.parametrize("make", [make_mopd, make_camopd])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_score_that_is_no_number_ends_the_run(make: Callable[[], Mopd], bad: float) -> None:
    """Every comparison with NaN is false: the prefix sum would silently keep one sample."""
    batch = [*random_batch(12), make_scored([-1.0, -1.0], [-1.0, bad], prompt_id="broken")]
    with pytest.raises(FloatingPointError, match=r"branch general: .* prompt 'broken'"):
        make().select(batch)


def test_a_batch_without_any_gap_is_said_to_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    make_camopd().select(random_batch(13))
    assert not caplog.records
    make_camopd().select([make_scored([-1.0], [-1.0], branch="domain")])
    assert "branch domain: every score is 0" in caplog.text


def kept_prompts(selection: Selection, batch: Sequence[Scored]) -> set[str]:
    return {batch[index].rollout.prompt.id for index in selection.selected}


@pytest.mark.parametrize("seed", range(5))
def test_selection_does_not_depend_on_the_order_of_the_batch(seed: int) -> None:
    batch = random_batch(seed)
    order = np.random.default_rng(seed).permutation(len(batch))
    shuffled = [batch[index] for index in order]
    algorithm = make_camopd()
    straight, other = algorithm.select(batch), algorithm.select(shuffled)
    assert 0 < len(straight.selected) < len(batch)
    assert kept_prompts(straight, batch) == kept_prompts(other, shuffled)
    weights = {batch[i].rollout.prompt.id: s.weights_R for i, s in pairs(straight)}
    for index, sample in pairs(other):
        np.testing.assert_array_equal(sample.weights_R, weights[shuffled[index].rollout.prompt.id])


def pairs(selection: Selection) -> list[tuple[int, Sample]]:
    return list(zip(selection.selected, selection.samples, strict=True))


def test_tied_samples_are_chosen_by_their_place_in_the_batch() -> None:
    batch = [make_scored([-1.0], [-0.5], prompt_id=f"p{index}") for index in range(4)]
    selection = make_camopd(general={"mass": 0.5}).select(batch)
    assert selection.selected == [0, 1]


@pytest.mark.parametrize("scale", [2.0, 3.0])
def test_the_branch_scale_multiplies_all_weights(scale: float) -> None:
    batch = random_batch(7)
    plain = make_camopd(general={"scale": 1.0}).select(batch)
    scaled = make_camopd(general={"scale": scale}).select(batch)
    assert scaled.selected == plain.selected
    for one, many in zip(plain.samples, scaled.samples, strict=True):
        np.testing.assert_allclose(many.weights_R, scale * one.weights_R, rtol=1e-6)


def test_the_scale_of_one_branch_leaves_the_other_alone() -> None:
    batch = random_batch(8, branch="domain")
    plain = make_camopd(general={"scale": 1.0}).select(batch)
    scaled = make_camopd(general={"scale": 5.0}).select(batch)
    for one, other in zip(plain.samples, scaled.samples, strict=True):
        np.testing.assert_array_equal(one.weights_R, other.weights_R)


def test_camopd_without_selection_and_scaling_is_vanilla_on_its_branch() -> None:
    batch = random_batch(9)
    camopd = make_camopd(general={"mass": 1.0, "scale": 1.0}).select(batch)
    vanilla = make_mopd().select(batch)
    assert camopd.selected == vanilla.selected
    for one, other in zip(camopd.samples, vanilla.samples, strict=True):
        np.testing.assert_array_equal(one.weights_R, other.weights_R)
    assert loss_of(camopd, batch) == loss_of(vanilla, batch)


def test_a_mixed_step_is_the_sum_of_both_branches_losses() -> None:
    general, domain = random_batch(10, size=5), random_batch(11, branch="domain", size=3)
    mixed = [*domain[:1], *general, *domain[1:]]
    algorithm = make_mopd()
    alone = loss_of(algorithm.select(general), general) + loss_of(algorithm.select(domain), domain)
    assert loss_of(algorithm.select(mixed), mixed) == pytest.approx(alone, rel=1e-6)


def test_the_domain_branch_is_scored_by_the_positive_gap_alone() -> None:
    worse = make_scored([-1.0, -1.0], [-9.0, -9.0], branch="domain")
    better = make_scored([-1.0, -1.0], [-0.9, -1.0], branch="domain")
    selection = make_camopd().select([worse, better])
    assert selection.scores == {0: 0.0, 1: pytest.approx(0.05)}
    assert selection.selected == [1]


def test_samples_hold_prompt_and_response_and_score_the_response() -> None:
    sample = make_mopd().select(W3).samples[0]
    assert sample.span.token_ids_N.tolist() == [11, 12, 13, 20, 21, 22]
    assert sample.span.num_scored == len(sample.weights_R) == 3
    assert sample.weights_R.dtype == np.float32


def test_metrics_of_a_step_are_those_of_its_branch() -> None:
    batch = [*W3, make_scored([-0.1] * 4, [-0.1] * 4, prompt_id="three")]
    capped = replace(batch[2], rollout=replace(batch[2].rollout, finish_reason="length"))
    metrics = make_camopd(general={"mass": 0.5}).select([*batch[:2], capped]).metrics
    assert {name.split("/")[0] for name in metrics} == {"general"}
    expected = {
        "selected_fraction": 1 / 3,
        "score_mean": (0.766667 + 0.55) / 3,
        "score_p50": 0.55,
        "gap": (0.3 - 0.5 + 1.5 + 0.4 - 0.7) / 9,
        "importance": (1.105171 + 1 + 6) / 9,
        "masked_fraction": 1 / 9,
        "log_ratio_absolute": (0.1 + 1.0) / 9,
        "response_tokens": 3.0,
        "capped_fraction": 1 / 3,
    }
    found = {name: metrics[f"general/{name}"] for name in expected}
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_configuration_names_the_algorithm() -> None:
    assert made(camopd_tree()).draws(0) == {"general": 4}
    tree = camopd_tree()
    tree["algorithm"] = {
        "kind": "mopd",
        "general": {"pool": "general", "teacher": "general"},
        "domain": {"pool": "medical", "teacher": "domain"},
    }
    algorithm = made(tree)
    assert algorithm.draws(0) == {"general": 2, "domain": 2}


def test_importance_bounds_come_from_the_configuration() -> None:
    tree = camopd_tree()
    tree["algorithm"]["importance"] = {"low": 0.3, "high": 9.0}
    algorithm = made(tree)
    item = make_scored([-2.0, 0.0], [-1.0, 0.0], rollout_R=[-1.0, -2.0])
    masked = algorithm.select([item]).metrics["general/masked_fraction"]
    assert masked == 0.0
    assert make_camopd().select([item]).metrics["general/masked_fraction"] == 1.0


def test_a_branchs_top_k_overlap_is_that_of_the_two_sides_ids() -> None:
    def top(ids: list[list[int]]) -> TopK:
        return TopK(
            ids_RK=np.array(ids, dtype=np.int32), logprobs_RK=float32(np.log([[0.5, 0.25]]))
        )

    item = make_scored([-1.0], [-1.0])
    student = replace(item.student, top_k=top([[4, 9]]))
    teacher = replace(item.teacher, top_k=top([[9, 3]]))
    metrics = make_mopd().select([replace(item, student=student, teacher=teacher)]).metrics
    assert metrics["general/top_k_overlap"] == 0.5
    assert metrics["general/teacher_top_k_mass"] == pytest.approx(0.75)


def test_a_token_mean_and_balanced_shares_normalise_as_they_say() -> None:
    """A response of three tokens in one branch, two of one token in the other."""
    batch = [
        make_scored([0.0] * 3, [1.0] * 3),
        make_scored([0.0], [1.0], branch="domain", prompt_id="two"),
        make_scored([0.0], [1.0], branch="domain", prompt_id="three"),
    ]

    def weights(normalise: str) -> list[list[float]]:
        selection = make_mopd(normalise=normalise).select(batch)
        return [sample.weights_R.tolist() for sample in selection.samples]

    assert weights("sequence") == [pytest.approx([1 / 3] * 3), [0.5], [0.5]]
    for own_R in weights("token"):
        assert own_R == pytest.approx([1 / 5] * len(own_R))
    # Shares 1/3 and 2/3 of the prompts; of five tokens the branches have three and two.
    general, domain, _ = weights("share")
    assert general == pytest.approx([1 / 9] * 3)
    assert domain == pytest.approx([1 / 3])


def test_mis_divides_by_the_tokens_that_are_left() -> None:
    item = make_scored([-1.0, -1.0], [0.0, 0.0], rollout_R=[-1.0, -4.0])
    masked, shortened = (
        make_mopd(importance={"kind": kind}).select([item]).samples[0].weights_R.tolist()
        for kind in ("mask", "mis")
    )
    assert masked == [0.5, 0.0]
    assert shortened == [1.0, 0.0]


def test_relaxed_opd_divides_by_the_response_unless_told_otherwise() -> None:
    item = make_scored([0.0, 0.0], [1.0, 1.0])
    item = replace(item, student=replace(item.student, entropy_R=float32([0.1, 2.0])))
    tokens = {"kind": "entropy", "share": 0.5}
    for shorten, expected in ((False, 0.5), (True, 1.0)):
        algorithm = make_mopd(tokens=tokens | {"shorten": shorten})
        assert algorithm.scoring.student.entropy
        (sample,) = algorithm.select([item]).samples
        assert sample.weights_R.tolist() == [0.0, expected]


def test_entropy_aware_opd_compares_where_the_teacher_is_unsure() -> None:
    ids = TopK(ids_RK=np.zeros((2, 16), dtype=np.int32), logprobs_RK=float32(np.zeros((2, 16))))
    item = make_scored([0.0, 0.0], [1.0, 2.0])
    teacher = replace(item.teacher, entropy_R=float32([0.7, 0.9]), top_k=ids)
    algorithm = make_mopd(loss={"kind": "entropy_aware"})
    assert (algorithm.scoring.teacher.entropy, algorithm.scoring.teacher.top_k) == (True, 16)
    (sample,) = algorithm.select([replace(item, teacher=teacher)]).samples
    assert sample.weights_R.tolist() == [0.5, 1.0]
    assert sample.divergence_weights_R is not None
    assert sample.divergence_weights_R.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_divergence_takes_the_importance_weight_where_it_shall(weighted: bool) -> None:
    item = make_scored([-1.0, -1.0], [0.0, 0.0], rollout_R=[-1.5, -4.0])
    hidden_RD = torch.zeros(2, 4)
    item = replace(item, teacher=replace(item.teacher, hidden_RD=hidden_RD))
    loss = {"kind": "forward_kl", "importance": weighted}
    (sample,) = make_mopd(loss=loss).select([item]).samples
    assert sample.divergence_weights_R is not None
    expected = [np.exp(0.5) / 2, 0.0] if weighted else [0.5, 0.5]
    assert sample.divergence_weights_R.tolist() == pytest.approx(expected)
    assert sample.weights_R.tolist() == [0.0, 0.0]
    assert (sample.teacher, sample.hidden_RD is hidden_RD) == ("general", True)
