"""Shares and draws."""

from hypothesis import given
from hypothesis import strategies as st

from megadistill.prepare.sampling import draw_rows, largest_remainder

NEMOTRON = {
    "chat": 746_622,
    "code": 1_896_395,
    "math": 2_044_407,
    "stem": 20_662_167,
    "tool": 310_051,
}


def test_the_papers_ten_thousand_are_shared_out_as_it_says() -> None:
    shares = {"chat": 291, "code": 739, "math": 797, "stem": 8052, "tool": 121}
    assert largest_remainder(NEMOTRON, 10_000) == shares


@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 10**8), min_size=1, max_size=8),
    st.integers(0, 10**5),
)
def test_shares_add_up_and_none_is_off_by_one_or_more(weights: dict[str, int], total: int) -> None:
    shares = largest_remainder(weights, total)
    whole = sum(weights.values())
    assert sum(shares.values()) == total
    assert all(abs(shares[name] - total * weights[name] / whole) < 1 for name in weights)


def test_a_larger_draw_begins_with_the_smaller_and_repeats_nothing() -> None:
    small, large = (draw_rows([50, 3, 1000], count, 7, "part") for count in (20, 400))
    assert large[:20] == small
    assert len(set(large)) == 400
    assert all(1 <= number <= [50, 3, 1000][index] for index, number in large)


def test_every_row_has_the_same_chance() -> None:
    hits = [0] * 40
    for seed in range(500):
        for _, number in draw_rows([40], 10, seed, "part"):
            hits[number - 1] += 1
    assert min(hits) > 85  # 125 expected, standard deviation 9.7
    assert max(hits) < 165


def test_a_draw_from_millions_keeps_only_what_it_takes() -> None:
    assert len(set(draw_rows([3_000_000], 1000, 0, "part"))) == 1000
