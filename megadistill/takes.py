"""What the verbs of the command line take."""

import argparse


def submit(command: argparse.ArgumentParser) -> None:
    """A verb, how, and a configuration."""
    command.add_argument("job", choices=("train",), help="verb to run as a job")
    command.add_argument(
        "--dry-run", action="store_true", help="print the job script and the layout"
    )
    config(command)


def campaign(command: argparse.ArgumentParser) -> None:
    """A configuration, or an action and a directory."""
    command.usage = (
        f"{command.prog} [--local] CONFIG [KEY=VALUE ...]\n"
        f"       {command.prog} status|cancel|resume DIR"
    )
    command.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG",
        help="a file, see configs/campaign/, and settings to change; or what to do with a "
        "campaign and its directory, RUNS/NAME",
    )
    command.add_argument(
        "--local", action="store_true", help="run the stages here, also where there is Slurm"
    )


def eval(command: argparse.ArgumentParser) -> None:
    """A configuration, or systems to compare."""
    command.usage = (
        f"{command.prog} CONFIG [KEY=VALUE ...]\n       {command.prog} --compare "
        "[--output DIR] [--confidence C] [NAME=]DIR[,DIR...] ..."
    )
    command.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG",
        help="a file, see configs/eval/, and settings to change; or RUN/results/SYSTEM of each "
        "system, the baseline first",
    )
    command.add_argument(
        "--compare", action="store_true", help="tables of systems that have results"
    )
    command.add_argument(
        "--output", default="report", metavar="DIR", help="where tables go (report)"
    )
    command.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="of the intervals (0.95)"
    )


def prepare(command: argparse.ArgumentParser) -> None:
    """A configuration."""
    command.add_argument(
        "--download-only",
        action="store_true",
        help="copy what the hub has into the mirror, no more",
    )
    config(command)


def status(command: argparse.ArgumentParser) -> None:
    """A run."""
    command.add_argument("run", help="run directory, e.g. runs/camopd_medical")
    command.add_argument(
        "--watch", action="store_true", help="follow until the run is done, from before it starts"
    )
    command.add_argument(
        "--give-up", type=float, default=1800, metavar="S", help="end after S silent seconds"
    )


def doctor(command: argparse.ArgumentParser) -> None:
    """A site."""
    command.add_argument("--config", metavar="FILE", help="a run whose `cluster` section to check")
    command.add_argument(
        "--cluster",
        metavar="FILE",
        help="a site profile, see configs/clusters/; wins over --config",
    )
    command.add_argument(
        "--shared", default="runs", metavar="DIR", help="directory that all nodes see (runs)"
    )


def convert(command: argparse.ArgumentParser) -> None:
    """From, to, and what only one direction needs."""
    command.add_argument("to", choices=("megatron", "hf", "fapm"), help="what TARGET becomes")
    command.add_argument("source", help="Hugging Face directory, or Megatron checkpoint")
    command.add_argument("target", help="directory to write; must not exist")
    command.add_argument(
        "--model", help="to hf: has configuration and tokenizer; to fapm: the model before tuning"
    )
    command.add_argument("--keep", type=float, default=0.1, help="to fapm: share of changes (0.1)")
    command.add_argument("--max-file-gb", type=float, default=5, help="size of one file, in GB")


def runs(command: argparse.ArgumentParser) -> None:
    """Runs, and where their page and picture go."""
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directory; several to compare")
    command.add_argument(
        "--picture", metavar="FILE", help="PNG (default: in the run; of several, none)"
    )
    command.add_argument("--page", metavar="FILE", help="HTML to write (default: in the first run)")


def config(command: argparse.ArgumentParser) -> None:
    """A file and what to change of it."""
    command.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, e.g. batch.size=64"
    )


def recipe(command: argparse.ArgumentParser) -> None:
    """A recipe and a directory."""
    command.add_argument(
        "name", help="path as `recipes list` shows it, e.g. camopd/medical, or a folder"
    )
    command.add_argument("directory", help="where configs/ and slurm/ of it go")
