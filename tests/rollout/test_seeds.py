import subprocess
import sys

from megadistill.rollout.seeds import seed_for


def test_a_seed_is_the_same_in_every_process() -> None:
    code = "from megadistill.rollout.seeds import seed_for; print(seed_for(1, 2, 'p', 3))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert int(printed.stdout) == seed_for(1, 2, "p", 3) == 883437035


def test_seeds_differ_by_run_step_prompt_and_sample() -> None:
    seeds = {
        seed_for(run, step, prompt, sample)
        for run in range(3)
        for step in range(11)
        for prompt in ("1", "11", "a/1")
        for sample in range(3)
    }
    assert len(seeds) == 3 * 11 * 3 * 3
    assert all(0 <= seed < 2**31 for seed in seeds)
