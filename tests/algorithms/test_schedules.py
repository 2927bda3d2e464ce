"""Schedules against the worked examples W11 and W12, and what they keep when a run is resumed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.algorithms.mopd import share_factors
from megadistill.algorithms.schedules import (
    BranchSchedule,
    Counteraction,
    Cycle,
    GapFollowing,
    Reading,
    VelocityFollowing,
    apportion,
    counteraction,
    first_shares,
    gap_factor,
    make_schedule,
    repeats_for,
    shares_of,
    velocity_following,
)
from megadistill.config.algorithm import MopdConfig
from megadistill.config.distillation import (
    BranchConfig,
    CounteractionSchedule,
    GapSchedule,
    VelocitySchedule,
)
from megadistill.types import FloatArray
from tests.tiny import camopd_tree, float32, make_config

BRANCHES = ("general", "medical", "roleplay")
BRANCHES_OF_TWO = {
    "branches": {
        "general": {"pool": "general", "teacher": "general"},
        "domain": {"pool": "medical", "teacher": "domain"},
    }
}


def test_remaining_gap_times_velocity_gives_the_worked_shares() -> None:
    """W11: remaining gaps (0.8, 0.5), velocities (0.02, 0.06)."""
    shares = shares_of([0.8 * 0.02, 0.5 * 0.06], temperature=0.5, floor=0.1)
    np.testing.assert_allclose(shares, [0.282249, 0.717751], atol=1e-6)
    assert apportion(512, {"a": shares[0], "b": shares[1]}) == {"a": 145, "b": 367}


def test_every_branch_keeps_its_floor() -> None:
    shares = shares_of([1.0, 0.0, 0.0], temperature=0.1, floor=0.1)
    np.testing.assert_allclose(shares, np.array([1.0, 0.1, 0.1]) / 1.2, atol=1e-4)
    assert shares_of([0.0, 0.0], temperature=0.5, floor=0.1) == [0.5, 0.5]


@pytest.mark.parametrize("scores", [[-3.0, -1.0], [-3.0, -1e-5], [-1.0, 0.0]])
def test_shares_are_equal_where_no_gap_remains(scores: list[float]) -> None:
    """Sampled gaps may be below zero: the largest is then no measure, and its sign turns the order."""
    assert shares_of(scores, temperature=0.5, floor=0.1) == [0.5, 0.5]


def test_a_small_temperature_gives_all_to_the_first() -> None:
    shares = shares_of([1.0, 0.5, -2.0], temperature=1e-4, floor=0.1)
    np.testing.assert_allclose(shares, np.array([1.0, 0.1, 0.1]) / 1.2)


@pytest.mark.parametrize("kind", ["mixed", "gap"])
def test_shares_that_leave_a_branch_without_prompts_are_refused(kind: str) -> None:
    def schedule(size: int) -> BranchSchedule:
        shares = {"kind": kind, "shares": {"general": 100, "domain": 1}}
        algorithm = {"kind": "mopd", "schedule": shares, **BRANCHES_OF_TWO}
        config = make_config(camopd_tree(algorithm=algorithm, batch={"size": size}))
        assert isinstance(config.algorithm, MopdConfig)
        return make_schedule(config.algorithm, config, {})

    assert schedule(101).draws(0) == {"general": 100, "domain": 1}
    with pytest.raises(
        ValueError, match=r"schedule\.shares: .* gives \['domain'\] none of the batch"
    ):
        schedule(24)


@given(st.integers(0, 600), st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_apportioned_prompts_add_up_and_are_near_their_share(
    total: int, parts: list[float]
) -> None:
    shares = {str(index): part for index, part in enumerate(parts)}
    counts = apportion(total, shares)
    assert sum(counts.values()) == total
    for name, share in shares.items():
        assert abs(counts.get(name, 0) - total * share / sum(parts)) < 1


@pytest.mark.parametrize(("total", "share"), [(5, 0.5), (7, 0.5), (5, 0.7), (10, 0.25), (24, 0.5)])
def test_two_shares_are_what_rounding_one_of_them_gives(total: int, share: float) -> None:
    general = round(total * share)
    assert apportion(total, {"general": share, "domain": 1 - share}) == {
        "general": general,
        "domain": total - general,
    }


def test_token_shares_are_balanced_as_in_the_worked_example() -> None:
    """W12: (10500, 409) tokens, half each: the sum of all stays what it was."""
    factors = share_factors({"a": 0.5, "b": 0.5}, {"a": 10500, "b": 409})
    assert factors == {
        "a": pytest.approx(0.519476, abs=1e-6),
        "b": pytest.approx(13.336186, abs=1e-6),
    }
    assert factors["a"] * 10500 == pytest.approx(factors["b"] * 409)


def test_a_larger_gap_weighs_more() -> None:
    """W12: gaps (0.6, 0.2), their mean 0.4: factors (1.5, 0.5), within [0.05, 20]."""
    config = GapSchedule()
    assert [gap_factor(gap, 0.4, config) for gap in (0.6, 0.2)] == pytest.approx([1.5, 0.5])
    assert gap_factor(100.0, 0.4, config) == 20
    assert gap_factor(0.0, 0.4, config) == 0.05
    assert gap_factor(0.0, 0.0, config) == 1.0
    schedule = GapFollowing([{"a": 1, "b": 1}], config)
    assert schedule.factor("a") == 1.0
    schedule.observe(0, {"a": Reading(-0.6, 0.6), "b": Reading(-0.2, 0.2)})
    assert [schedule.factor(name) for name in "ab"] == pytest.approx([1.5, 0.5])
    schedule.observe(1, {"a": Reading(-0.6, 1.6)})
    assert schedule.gaps == {"a": pytest.approx(0.7), "b": 0.2}
    assert GapFollowing([{}], config, dict(schedule.state())).factor("a") == schedule.factor("a")


def test_a_cycle_repeats() -> None:
    cycle = Cycle([{"a": 4}, {"a": 4}, {"b": 4}])
    assert [next(iter(cycle.draws(step))) for step in range(6)] == ["a", "a", "b"] * 2


def make_velocity(
    state: dict[str, float] | None = None, delay: int = 0, **settings: float
) -> VelocityFollowing:
    config = VelocitySchedule.model_validate({"every": 4, "first": 2, **settings})
    return velocity_following(config, BRANCHES, 30, seed=1, delay=delay, state=state or {})


def gaps_at(step: int) -> dict[str, Reading]:
    """One branch closes its gap fast, one slowly, one not at all."""
    left = {"general": 0.9**step, "medical": 0.99**step, "roleplay": 1.0}
    return {name: Reading(-gap, gap) for name, gap in left.items()}


def test_shares_are_equal_until_there_is_a_history_then_follow_the_fast_branch() -> None:
    schedule = make_velocity()
    draws = []
    for step in range(24):
        draws.append(dict(schedule.draws(step)))
        schedule.observe(step, gaps_at(step))
    assert all(counts == dict.fromkeys(BRANCHES, 10) for counts in draws[:8])
    assert draws[8]["general"] > draws[8]["medical"] >= draws[8]["roleplay"]
    assert draws[8] == draws[9] == draws[11]
    assert all(sum(counts.values()) == 30 for counts in draws)


def test_the_remaining_gap_and_velocity_are_those_of_the_formula() -> None:
    schedule = make_velocity()
    gaps = [0.9**step for step in range(8)]
    for step in range(8):
        schedule.observe(step, gaps_at(step))
    average, averages = gaps[0], [gaps[0]]
    for gap in gaps[1:]:
        average = 0.9 * average + 0.1 * gap
        averages.append(average)
    first = (gaps[0] + gaps[1]) / 2
    history = schedule.branches["general"]
    assert history.remaining == pytest.approx([averages[3] / first, averages[7] / first])
    assert history.velocity() == pytest.approx((averages[3] - averages[7]) / first)


@pytest.mark.parametrize("stop", [3, 8, 13])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_a_schedule_that_is_resumed_draws_what_it_would_have_drawn(
    stop: int, delay: int, jitter: float
) -> None:
    straight = make_velocity(delay=delay, jitter=jitter)
    expected = []
    state: dict[str, float] = {}
    for step in range(20):
        expected.append(dict(straight.draws(step)))
        straight.observe(step, gaps_at(step))
        if step + 1 == stop:
            state = straight.state()
    resumed = make_velocity(state, delay=delay, jitter=jitter)
    for step in range(stop, 20):
        assert resumed.draws(step) == expected[step]
        resumed.observe(step, gaps_at(step))
    assert resumed.state() == straight.state()


def test_prompts_that_are_drawn_ahead_are_those_that_the_step_draws() -> None:
    """With one step of look-ahead the draws of a step do not change once they were made."""
    schedule = make_velocity(delay=1)
    ahead: dict[int, dict[str, int]] = {}
    for step in range(20):
        assert dict(schedule.draws(step)) == ahead.get(step, dict(schedule.draws(step)))
        ahead[step + 1] = dict(schedule.draws(step + 1))
        schedule.observe(step, gaps_at(step))


@pytest.mark.parametrize(
    ("cosine", "expected"), [(0, 3), (-0.6, 5), (0.5, 2), (1, 1), (0.9, 1), (-1, 6)]
)
def test_the_more_the_branches_counteract_the_more_steps_recover(
    cosine: float, expected: int
) -> None:
    """Worked numbers of section 7.3; 1.5 rounds to even."""
    assert repeats_for(cosine, 3) == expected


def make_counteraction(
    state: dict[str, float] | None = None, delay: int = 0, names: str = "RSpq"
) -> Counteraction:
    """Branches whose names are capital letters recover."""
    branches = {
        name: BranchConfig(pool="p", teacher="t", role="recover" if name.isupper() else "preserve")
        for name in names
    }
    return counteraction(CounteractionSchedule(), branches, 8, delay=delay, state=state or {})


def order_of(schedule: Counteraction, steps: range) -> str:
    """The branch of each step."""
    drawn = [schedule.draws(step) for step in steps]
    assert all(list(counts.values()) == [8] for counts in drawn)
    return "".join(name for counts in drawn for name in counts)


def at_cosine(cosine: float) -> dict[str, FloatArray]:
    """Gradients whose means over the roles have this cosine, unlike those of single branches."""
    x, y = 3 * cosine, 3 * np.sqrt(1 - cosine**2)
    gradients = {"R": (2.0, 5.0), "S": (2.0, -5.0), "p": (x + 1, y), "q": (x - 1, y)}
    return {name: float32(gradient) for name, gradient in gradients.items()}


def test_recovering_branches_take_turns_and_every_preserving_one_follows() -> None:
    assert order_of(make_counteraction(), range(15)) == "RSRpq" + "SRSpq" + "RSRpq"
    assert order_of(make_counteraction(names="Rp"), range(8)) == "RRRp" * 2


@pytest.mark.parametrize(
    ("delay", "taken", "expected"),
    [
        (0, 2, "RSRpq" + "SRSRSpq"),  # within a block, which keeps its length
        (0, 5, "RSRpq" + "SRSRSpq"),  # between two blocks
        (1, 4, "RSRpq" + "SRSRSpq"),
        (1, 5, "RSRpq" + "SRSpq" + "RSRSRpq"),  # the next block's first prompts are drawn
    ],
)
def test_a_new_number_holds_for_the_blocks_of_which_nothing_is_drawn(
    delay: int, taken: int, expected: str
) -> None:
    schedule = make_counteraction(delay=delay)
    found = order_of(schedule, range(taken + delay))
    learnt = schedule.learn(taken, at_cosine(-0.6))
    assert learnt["schedule/cosine"] == pytest.approx(-0.6)
    found += order_of(schedule, range(taken + delay, len(expected)))
    assert found == expected
    state = {name: float(value) for name, value in schedule.state().items()}
    resumed = make_counteraction(state, delay=delay)
    assert order_of(resumed, range(taken, len(expected))) == expected[taken:]


def test_what_is_learnt_names_every_pair_of_branches() -> None:
    gradients = at_cosine(0.5)
    learnt = make_counteraction().learn(20, gradients)
    pairs = ("R_S", "R_p", "R_q", "S_p", "S_q", "p_q")
    assert learnt.keys() - {"schedule/cosine"} == {
        f"probe/{pair}_{what}" for pair in pairs for what in ("dot", "cosine")
    }
    assert learnt["probe/R_S_dot"] == pytest.approx(-21)
    assert learnt["probe/R_S_cosine"] == pytest.approx(-21 / 29)
    still = gradients | {"p": float32([0, 0]), "q": float32([0, 0])}
    schedule = make_counteraction()
    assert "probe/R_p_cosine" not in schedule.learn(20, still)
    assert schedule.repeats == 3, "nothing counteracts a gradient of zero"


def test_jitter_varies_the_counts_and_repeats_itself() -> None:
    schedule, again = make_velocity(jitter=0.3), make_velocity(jitter=0.3)
    counts = [tuple(schedule.draws(step).values()) for step in range(20)]
    assert len(set(counts)) > 3
    assert counts == [tuple(again.draws(step).values()) for step in range(20)]
    assert all(min(row) >= 6 and max(row) <= 15 for row in counts)


def test_shares_in_any_unit_add_up_to_one() -> None:
    assert first_shares(["a", "b"], {"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}
    assert first_shares(["a", "b"], None) == {"a": 0.5, "b": 0.5}
    assert first_shares(["a", "b", "c"], {"c": 2.0}) == {"a": 0, "b": 0, "c": 1}
