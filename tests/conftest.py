"""What every test gets: quiet libraries, a cache of its own, and skips by what the machine has."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from megadistill.config import cache_dir

SLURM_DAEMONS = ("munged", "slurmctld", "slurmd")


def pytest_configure() -> None:
    """Before any test module imports torch, transformers or wandb."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    if not Path("/dev/nvidiactl").exists():
        # Read when Triton is first imported, which any library may do.
        os.environ["TRITON_INTERPRET"] = "1"
    # The same examples every time, however slow the machine is at the moment.
    settings.register_profile(
        "steady",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; only the markers in use are looked into."""
    marked: dict[str, list[pytest.Item]] = {}
    for item in items:
        for marker in item.iter_markers():
            marked.setdefault(marker.name, []).append(item)
    for name, missing in (
        ("gpu", missing_gpu),
        ("megatron", missing_megatron),
        ("vllm", missing_vllm),
        ("slurm", missing_slurm),
    ):
        if name in marked and (reason := missing()):
            for item in marked[name]:
                item.add_marker(pytest.mark.skip(reason=reason))


def missing_gpu() -> str | None:
    """Why `gpu` tests cannot run; importing torch is worth it only when there are any."""
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA GPU"


def missing_megatron() -> str | None:
    return None if importlib.util.find_spec("megatron") else "megatron-core is not installed"


def missing_vllm() -> str | None:
    return None if importlib.util.find_spec("vllm") else "vllm is not installed"


def missing_slurm() -> str | None:
    # Daemons lie in sbin, which is not on every user's path.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    absent = [name for name in SLURM_DAEMONS if shutil.which(name, path=path) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@pytest.fixture(scope="module")
def real_cache() -> Iterator[Path]:
    """The user's own cache of prepared models, from here to the end of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGADISTILL_CACHE", str(_REAL_CACHE))
        yield _REAL_CACHE


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`cache_dir()` is empty and temporary in tests and in the processes they start."""
    os.environ["MEGADISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


_REAL_CACHE = cache_dir()
