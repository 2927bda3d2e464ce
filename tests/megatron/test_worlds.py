"""The helper of our own tests: a broken world is reported, not waited for."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.megatron.worlds import run_world

pytestmark = pytest.mark.multi


def add_ranks(base: int) -> int:
    total = torch.tensor(base + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise LookupError("rank one is lost")
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def test_rank_zero_brings_the_result_back() -> None:
    assert run_world(add_ranks, 2, 10) == 21


def test_the_rank_that_failed_first_is_named() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*rank one is lost"):
        run_world(fail_on_rank_one, 2)


def test_a_hanging_world_ends_in_time() -> None:
    with pytest.raises(AssertionError, match="not done in time"):
        run_world(hang, 1, timeout_s=3)
