"""From a step's number to its batch, between fake engines: draws, seeds, teachers, look-ahead."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from megadistill.algorithms import Mopd, Sft
from megadistill.collect import AnswerCollector, Batch, OnPolicyCollector, Sampler, timed
from megadistill.data.pools import PromptPool, answer_ids
from megadistill.publish.files import Published
from megadistill.types import Prompt
from tests.fake_engines import FakeRolloutEngine, FakeTrainingEngine
from tests.tiny import Tree, camopd_tree, decisions, make_prompt, make_tokenizer

NUM_STEPS = 6


def make_pool(name: str, size: int = 10) -> PromptPool:
    train = [make_prompt(f"{name}-{index}", pool=name, answer="a b") for index in range(size)]
    return PromptPool(name=name, train=train, heldout=[], num_dropped=0, seed=0)


POOLS = {name: make_pool(name) for name in ("general", "medical")}


def make_sampler(engines: FakeRolloutEngine, *, look_ahead: bool = False, seed: int = 0) -> Sampler:
    return Sampler(engines, seed=seed, num_steps=NUM_STEPS, look_ahead=look_ahead)


def make_collector(
    engines: FakeRolloutEngine | None = None,
    scorer: FakeTrainingEngine | None = None,
    *,
    tree: Tree | None = None,
    cursors: Mapping[str, int] | None = None,
    sampler: Sampler | None = None,
    responses: int = 1,
) -> OnPolicyCollector:
    algorithm = decisions(tree)
    assert isinstance(algorithm, Mopd)
    sampler = sampler or make_sampler(engines or FakeRolloutEngine())
    return OnPolicyCollector(
        algorithm, POOLS, scorer or FakeTrainingEngine(), sampler, cursors or {}, responses
    )


def prompt_ids(batch: Batch) -> list[str]:
    return [item.rollout.prompt.id for item in batch.scored]


def publish(sampler: Sampler, version: int) -> None:
    """As the training loop does: first let rollouts end that are under way."""
    sampler.wait_pending()
    sampler.publish(version, Published(files=(), checksum="0"))


def test_cursors_count_the_prompts_drawn_from_each_pool() -> None:
    collector = make_collector()
    assert collector.cursors == {"general": 0, "medical": 0}
    counts = []
    for step in range(5):
        collector.collect(step)
        counts.append((collector.cursors["general"], collector.cursors["medical"]))
    assert counts == [(4, 0), (8, 0), (12, 0), (12, 4), (16, 4)]


def test_a_pass_over_a_pool_repeats_no_prompt() -> None:
    collector = make_collector()
    drawn = [prompt for step in (0, 1) for prompt in prompt_ids(collector.collect(step))]
    assert len(set(drawn)) == 8


def test_a_collector_continues_from_its_cursors() -> None:
    straight = make_collector()
    batches = [prompt_ids(straight.collect(step)) for step in range(4)]
    resumed = make_collector(cursors={"general": 8, "medical": 0})
    assert [prompt_ids(resumed.collect(step)) for step in (2, 3)] == batches[2:]


def test_each_branch_is_scored_by_its_own_teacher() -> None:
    scorer = FakeTrainingEngine()
    collector = make_collector(scorer=scorer)
    for step in (2, 3):
        collector.collect(step)
    assert [model for model, _ in scorer.asked] == ["student", "general", "student", "domain"]


def test_student_and_teacher_score_the_same_ids() -> None:
    scorer = FakeTrainingEngine()
    batch = make_collector(scorer=scorer).collect(0)
    (_, student_ids), (_, teacher_ids) = scorer.asked
    assert student_ids == teacher_ids
    assert student_ids == [
        [*item.rollout.prompt.token_ids, *item.rollout.response_ids_R.tolist()]
        for item in batch.scored
    ]


def test_gaps_come_from_the_scorer_and_mu_from_the_rollout_engine() -> None:
    batch = make_collector(scorer=FakeTrainingEngine({"general": 0.25})).collect(0)
    for item in batch.scored:
        assert item.gap_R.tolist() == [0.25] * 3
        assert item.student_logprobs_R.tolist() == (-item.rollout.response_ids_R).tolist()
        assert item.rollout.logprobs_R.tolist()[1:] == [-1.0, -2.0]


def test_a_mixed_batch_gives_each_rollout_the_score_of_its_teacher() -> None:
    branch = {"pool": "general", "teacher": "general"}
    algorithm = {
        "kind": "mopd",
        "general": branch,
        "domain": {"pool": "medical", "teacher": "domain"},
    }
    scorer = FakeTrainingEngine({"general": 0.5, "domain": -0.25})
    batch = make_collector(scorer=scorer, tree=camopd_tree(algorithm=algorithm)).collect(0)
    assert batch.branch == "general+domain"
    found = {item.branch: float(item.gap_R[0]) for item in batch.scored}
    assert found == {"general": 0.5, "domain": -0.25}
    assert [item.branch for item in batch.scored] == ["general"] * 2 + ["domain"] * 2
    assert all(item.rollout.prompt.pool == BRANCH_POOLS[item.branch] for item in batch.scored)


BRANCH_POOLS = {"general": "general", "domain": "medical"}


def test_two_branches_of_one_pool_draw_different_prompts() -> None:
    branch = {"pool": "general", "teacher": "general"}
    algorithm = {"kind": "mopd", "general": branch, "domain": branch}
    collector = make_collector(tree=camopd_tree(algorithm=algorithm))
    assert prompt_ids(collector.collect(0)) == [p.id for p in POOLS["general"].draw(0, 4)]
    assert collector.cursors == {"general": 4}


def test_seeds_differ_by_step_and_prompt_and_repeat_in_another_process() -> None:
    engines, again = FakeRolloutEngine(), FakeRolloutEngine()
    for fake in (engines, again):
        collector = make_collector(fake)
        for step in range(3):
            collector.collect(step)
    seeds = [seed for _, batch_seeds, _ in engines.asked for seed in batch_seeds]
    assert len(set(seeds)) == len(seeds) == 12
    assert again.asked == engines.asked


def test_a_prompt_drawn_again_later_has_another_seed() -> None:
    engines = FakeRolloutEngine()
    collector = make_collector(engines)
    for step in (0, 1, 2, 4):  # sixteen draws from ten prompts
        collector.collect(step)
    by_prompt: dict[str, set[int]] = {}
    for ids, seeds, _ in engines.asked:
        for prompt, seed in zip(ids, seeds, strict=True):
            by_prompt.setdefault(prompt, set()).add(seed)
    assert max(len(seeds) for seeds in by_prompt.values()) == 2


def test_the_seed_of_the_run_changes_every_seed() -> None:
    first, second = FakeRolloutEngine(), FakeRolloutEngine()
    make_collector(sampler=make_sampler(first, seed=0)).collect(0)
    make_collector(sampler=make_sampler(second, seed=1)).collect(0)
    assert first.asked[0][0] == second.asked[0][0]
    assert not set(first.asked[0][1]) & set(second.asked[0][1])


def versions(look_ahead: bool) -> list[int]:
    """The weights version that sampled each step's rollouts."""
    engines = FakeRolloutEngine()
    sampler = make_sampler(engines, look_ahead=look_ahead)
    collector = make_collector(sampler=sampler)
    found = []
    for step in range(NUM_STEPS):
        batch = collector.collect(step)
        (version,) = {item.rollout.policy_version for item in batch.scored}
        found.append(version)
        publish(sampler, step + 1)
    assert len(engines.asked) == NUM_STEPS
    return found


def test_on_policy_rollouts_come_from_the_newest_weights() -> None:
    assert versions(look_ahead=False) == [0, 1, 2, 3, 4, 5]


def test_look_ahead_rollouts_come_from_the_weights_before() -> None:
    assert versions(look_ahead=True) == [0, 0, 1, 2, 3, 4]


def test_colocated_engines_sleep_while_the_trainer_works() -> None:
    engines = FakeRolloutEngine()
    sampler = Sampler(engines, seed=0, num_steps=NUM_STEPS, colocated=True)
    assert engines.asleep
    collector = make_collector(sampler=sampler)
    for step in range(2):
        collector.collect(step)
        assert engines.asleep
        publish(sampler, step + 1)
        assert engines.asleep
    assert engines.naps == 5


def test_colocated_engines_sleep_again_after_a_failure() -> None:
    engines = FakeRolloutEngine(version=7)  # refuses: the weights are not the trainer's
    sampler = Sampler(engines, seed=0, num_steps=NUM_STEPS, colocated=True)
    with pytest.raises(AssertionError, match="stale weights"):
        make_collector(sampler=sampler).collect(0)
    assert engines.asleep


def test_look_ahead_draws_what_the_step_would_have_drawn() -> None:
    batches = []
    for look_ahead in (False, True):
        collector = make_collector(sampler=make_sampler(FakeRolloutEngine(), look_ahead=look_ahead))
        batches.append([prompt_ids(collector.collect(step)) for step in range(NUM_STEPS)])
    assert batches[0] == batches[1]


def test_look_ahead_samples_while_the_trainer_works() -> None:
    engines = FakeRolloutEngine()
    started = [threading.Event() for _ in range(2)]
    engines.before_generate = lambda: started[len(engines.asked) - 1].set()
    collector = make_collector(sampler=make_sampler(engines, look_ahead=True))
    collector.collect(0)
    assert started[1].wait(timeout=20)


def test_look_ahead_ends_with_the_last_step() -> None:
    engines = FakeRolloutEngine()
    sampler = make_sampler(engines, look_ahead=True)
    collector = make_collector(sampler=sampler)
    for step in range(NUM_STEPS):
        collector.collect(step)
    sampler.wait_pending()
    assert len(engines.asked) == NUM_STEPS


def test_look_ahead_leaves_the_cursors_where_training_stands() -> None:
    collector = make_collector(sampler=make_sampler(FakeRolloutEngine(), look_ahead=True))
    collector.collect(0)
    assert collector.cursors == {"general": 4, "medical": 0}


def test_new_weights_wait_for_rollouts_that_are_under_way() -> None:
    engines = FakeRolloutEngine()
    gate = threading.Event()

    def hold_back_step_one() -> None:
        if len(engines.asked) == 2:
            assert gate.wait(timeout=20)

    engines.before_generate = hold_back_step_one
    sampler = make_sampler(engines, look_ahead=True)
    collector = make_collector(sampler=sampler)
    collector.collect(0)
    with ThreadPoolExecutor(1) as thread:
        publishing = thread.submit(publish, sampler, 1)
        assert not wait([publishing], timeout=0.2).done
        assert engines.published == []
        gate.set()
        publishing.result(timeout=20)
    batch = collector.collect(1)
    assert {item.rollout.policy_version for item in batch.scored} == {0}


def test_an_engine_that_fails_ends_the_step() -> None:
    engines = FakeRolloutEngine()

    def fail() -> None:
        raise RuntimeError("engine 0 on node-3 died")

    engines.before_generate = fail
    with pytest.raises(RuntimeError, match="engine 0 on node-3 died"):
        make_collector(engines).collect(0)


def test_stale_weights_end_the_step() -> None:
    with pytest.raises(AssertionError, match="stale weights"):
        make_collector(FakeRolloutEngine(version=3)).collect(0)


def test_sampling_beside_the_stream_uses_what_is_published() -> None:
    engines = FakeRolloutEngine()
    sampler = make_sampler(engines)
    publish(sampler, 1_000_000)
    (rollout,) = sampler.generate([make_prompt("x")], [5], max_tokens=9)
    assert rollout.policy_version == 1_000_000
    assert engines.asked == [(["x"], [5], 9)]


def test_every_rank_ends_with_the_same_batch() -> None:
    """Only rank 0 has engines; the others get its rollouts and make the same selection."""
    meeting = threading.Barrier(2)
    board: list[object] = [None]
    algorithm = decisions()
    assert isinstance(algorithm, Mopd)

    def collect(rank: int) -> list[Batch]:
        scorer = FakeTrainingEngine({"general": 1.0}, rank=rank, meeting=meeting, board=board)
        sampler = make_sampler(FakeRolloutEngine()) if rank == 0 else None
        collector = OnPolicyCollector(algorithm, POOLS, scorer, sampler, {})
        return [collector.collect(step) for step in range(4)]

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(collect, (0, 1))
    for one, other in zip(first, second, strict=True):
        assert prompt_ids(one) == prompt_ids(other)
        assert list(one.selection.selected) == list(other.selection.selected)
        weights = [[s.weights_R.tolist() for s in b.selection.samples] for b in (one, other)]
        assert weights[0] == weights[1]


def test_metrics_of_a_batch_hold_times_and_speed() -> None:
    metrics = make_collector().collect(0).metrics
    assert metrics["rollout/tokens"] == 12
    expected = metrics["rollout/tokens"] / metrics["time/rollout"]
    assert metrics["rollout/tokens_per_s"] == pytest.approx(expected)
    assert metrics["time/score"] >= 0
    assert "general/selected_fraction" in metrics


def family(**settings: Any) -> Tree:
    """Three branches, of which two share a teacher."""
    branches = {
        "general": {"pool": "general", "teacher": "general"},
        "medical": {"pool": "medical", "teacher": "domain", "role": "preserve"},
        "nursing": {"pool": "medical", "teacher": "domain", "role": "preserve"},
    }
    # The fake engines do not agree on the student, so nothing is corrected.
    plain = {"importance": {"kind": "none"}}
    algorithm = {"kind": "mopd", "branches": branches, **plain, **settings}
    return camopd_tree(algorithm=algorithm, batch={"size": 6})


def test_a_teacher_of_two_branches_is_asked_once() -> None:
    scorer = FakeTrainingEngine({"domain": 0.25})
    batch = make_collector(scorer=scorer, tree=family()).collect(0)
    assert batch.branch == "general+medical+nursing"
    assert [(model, len(spans)) for model, spans in scorer.asked] == [
        ("student", 6),
        ("general", 2),
        ("domain", 4),
    ]
    assert [float(item.gap_R[0]) for item in batch.scored] == [0, 0, 0.25, 0.25, 0.25, 0.25]
    assert len(set(prompt_ids(batch))) == 6


def test_the_next_steps_teacher_is_fetched_while_this_step_trains() -> None:
    scorer = FakeTrainingEngine()
    collector = make_collector(scorer=scorer)
    first = collector.collect(0).metrics  # general, as the two steps after it
    assert {key for key in first if "general" in key and key.startswith(("time/", "switch/"))} == {
        "time/teacher/general",
        "time/switch/general",
        "time/switch_waited/general",
        "switch/general/gib",
    }
    collector.collect(1)
    assert "switch/domain/gib" in collector.collect(2).metrics


def test_a_branch_without_prompts_at_a_step_costs_nothing() -> None:
    scorer = FakeTrainingEngine()
    cycle = {"kind": "cycle", "order": ["general", "medical", "nursing"]}
    collector = make_collector(scorer=scorer, tree=family(schedule=cycle))
    for step in range(3):
        assert collector.collect(step).branch == cycle["order"][step]
    assert [model for model, _ in scorer.asked[1::2]] == ["general", "domain", "domain"]


def test_responses_to_one_prompt_stand_together_and_have_seeds_of_their_own() -> None:
    engines = FakeRolloutEngine()
    collector = make_collector(engines, responses=3)
    batch = collector.collect(0)
    drawn = [prompt.id for prompt in POOLS["general"].draw(0, 4)]
    assert prompt_ids(batch) == [prompt for prompt in drawn for _ in range(3)]
    assert collector.cursors == {"general": 4, "medical": 0}
    ((_, seeds, _),) = engines.asked
    assert len(set(seeds)) == 12
    assert set(batch.selection.scores) == set(range(12))


def test_a_reference_is_scored_and_enters_the_advantage() -> None:
    """G-OPD: lambda times what the teacher has over the reference, less what the student has."""
    scorer = FakeTrainingEngine({"general": 0.5, "domain": 0.25})
    settings = {"advantage": {"reference": "domain", "scale": 2.0}}
    batch = make_collector(scorer=scorer, tree=family(**settings)).collect(0)
    assert [model for model, _ in scorer.asked][-1] == "domain"
    assert all(item.reference_logprobs_R is not None for item in batch.scored)
    general = batch.selection.samples[0]
    # A = 2 (0.5 - 0.25) - (0 - 0.25) = 0.75; two samples of three tokens.
    assert general.weights_R.tolist() == pytest.approx([0.75 / 6] * 3)


def test_a_baseline_asks_for_the_expected_gap() -> None:
    scorer = FakeTrainingEngine({"general": 0.5}, weights=0.125)
    batch = make_collector(scorer=scorer, tree=family(advantage={"baseline": True})).collect(0)
    assert batch.scored[0].expected_gap_R is not None
    assert batch.scored[0].expected_gap_R.tolist() == [-0.25] * 3
    assert batch.selection.samples[0].weights_R.tolist() == pytest.approx([0.75 / 6] * 3)


def test_teachers_are_asked_about_the_students_ids_where_the_loss_is_on_them() -> None:
    loss = {"kind": "top_k", "size": 2, "side": "student", "importance": False}
    batch = make_collector(tree=family(loss=loss)).collect(0)
    item, sample = batch.scored[0], batch.selection.samples[0]
    assert item.student.top_k is not None
    assert sample.top_k is not None
    assert sample.top_k.ids_RK.tolist() == item.student.top_k.ids_RK.tolist()
    assert sample.top_k.logprobs_RK.tolist() == (-item.student.top_k.ids_RK).tolist()
    assert sample.divergence_weights_R is not None
    assert sample.divergence_weights_R.tolist() == pytest.approx([1 / 6] * 3)
    assert not sample.weights_R.any()


def test_hidden_states_are_asked_for_by_losses_over_every_id() -> None:
    scorer = FakeTrainingEngine({"general": 0.5})
    batch = make_collector(scorer=scorer, tree=family(loss={"kind": "jsd"})).collect(0)
    sample = batch.selection.samples[0]
    assert sample.teacher == "general"
    assert sample.hidden_RD is not None
    assert sample.hidden_RD.tolist() == [[0.5, 0.5]] * 3


def answer_collector(cursors: Mapping[str, int]) -> AnswerCollector:
    return AnswerCollector(Sft(3), POOLS["medical"], TOKENIZER, cursors)


TOKENIZER = make_tokenizer(["a b"])


def test_answers_are_drawn_in_the_order_of_the_pool() -> None:
    collector = answer_collector({})
    assert collector.cursors == {"medical": 0}
    drawn: list[Prompt] = []
    for step in range(3):
        batch = collector.collect(step)
        assert batch.branch == "sft"
        assert batch.metrics["sft/response_tokens"] == 3
        drawn += POOLS["medical"].draw(3 * step, 3)
        found = [sample.span.token_ids_N.tolist() for sample in batch.selection.samples]
        expected = [[*p.token_ids, *answer_ids(p, TOKENIZER)] for p in drawn[-3:]]
        assert found == expected
    assert collector.cursors == {"medical": 9}


def test_answers_continue_from_the_cursor() -> None:
    collector = answer_collector({"medical": 6})
    collector.collect(2)
    assert collector.cursors == {"medical": 9}


def test_times_of_one_name_add_up() -> None:
    times: dict[str, float] = {}
    for _ in range(2):
        with timed(times, "time/x"):
            threading.Event().wait(0.02)
    assert 0.04 <= times["time/x"] < 5
