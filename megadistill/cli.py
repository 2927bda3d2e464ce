"""The command line: one verb per subcommand. Heavy modules are imported by the verb that needs them."""

# ruff: noqa: PLC0415, T201 - imports inside verbs keep `--help` fast; a command prints
import argparse
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import megadistill
from megadistill import recipes, takes
from megadistill.config import (
    KINDS,
    EvaluateConfig,
    PrepareConfig,
    RefineConfig,
    RunConfig,
    dump,
    kind_of,
    load,
)

if TYPE_CHECKING:
    from megadistill.launch.campaign import Campaign
    from megadistill.launch.node_context import NodeContext
    from megadistill.rundir import RunDir

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `megadistill`; a user's mistake ends with one message and code 2."""
    arguments = _parser().parse_args(argv)
    verb: Verb = arguments.verb
    try:
        code = verb(arguments)
    except ValueError as error:
        print(f"megadistill: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("megadistill: interrupted; the same command goes on from here", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


def train(arguments: argparse.Namespace) -> int:
    """Run here, all roles on this machine."""
    from megadistill.launch.node import run_here
    from megadistill.launch.node_context import local_context

    _check(arguments, local_context())
    return run_here(arguments.config, arguments.overrides)


def node(arguments: argparse.Namespace) -> int:
    """This node's part of a Slurm job."""
    from megadistill.launch.node import run_under_slurm
    from megadistill.launch.node_context import slurm_context

    _check(arguments, slurm_context())
    return run_under_slurm(arguments.config, arguments.overrides)


def submit(arguments: argparse.Namespace) -> int:
    """The same verb as a Slurm job, through submitit."""
    from megadistill.launch import submit as submit_job

    if not arguments.dry_run:
        _check(arguments)
    submitted = submit_job(
        arguments.config, arguments.overrides, verb=arguments.job, dry_run=arguments.dry_run
    )
    if not arguments.dry_run:
        print(f"job {submitted.job_id}, run directory {submitted.run_dir}")
        print(f"follow it with: megadistill status {submitted.run_dir} --watch")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check the cluster, here and in a tiny job; code 1 when something would keep a run from going."""
    from rich.console import Console

    from megadistill.config.campaign import load_cluster
    from megadistill.launch.doctor import examine, table

    cluster = load_cluster(arguments.config, arguments.cluster)
    shared = Path(arguments.shared).absolute()
    shared.mkdir(mode=0o700, parents=True, exist_ok=True)
    findings = list(examine(cluster, shared))
    Console().print(table(findings))
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


def shard(arguments: argparse.Namespace) -> int:
    """One try of one shard of a fan-out, whose directory holds what it is to do."""
    from megadistill.launch.shards import run_shard

    run_shard(Path(arguments.directory))
    return 0


def campaign(arguments: argparse.Namespace) -> int:
    """Stages as dependent Slurm jobs: submit CONFIG (what is not done of it), or, with its
    directory, show its status, cancel it, resume it."""
    from megadistill.launch.campaign import Campaign

    action, *rest = arguments.words
    if action not in ("status", "cancel", "resume"):
        action, rest = "submit", arguments.words
    if not rest:
        raise ValueError(f"campaign {action}: found no CONFIG or campaign directory after it")
    chosen = Campaign.load(rest[0], rest[1:])
    return {"status": _campaign_status, "cancel": _campaign_cancel}.get(action, _campaign_submit)(
        chosen, arguments.local
    )


def refine(arguments: argparse.Namespace) -> int:
    """RAFT's stage 1: rewrite, filter and fuse a set of answers; again, it runs what is not done."""
    from megadistill.refine.pipeline import run_refinement

    print(run_refinement(load(RefineConfig, arguments.config, arguments.overrides)))
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    """Make training sets from published data sets; --download-only where there is network."""
    from megadistill.prepare.pipeline import run_preparation

    config = load(PrepareConfig, arguments.config, arguments.overrides)
    print(run_preparation(config, download_only=arguments.download_only))
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Run benchmarks and make their table; again, it runs what is not done. Or compare results."""
    if arguments.compare:
        from megadistill.evaluate.compare import parse_systems, write_tables

        systems = parse_systems(arguments.words)
        print(write_tables(systems, Path(arguments.output), arguments.confidence))
        return 0
    from megadistill.evaluate.pipeline import run_evaluation

    config, *overrides = arguments.words
    print(run_evaluation(load(EvaluateConfig, config, overrides)))
    return 0


def _campaign_submit(chosen: "Campaign", local: bool) -> int:
    for name, commands in chosen.commands().items():
        for words in commands:
            _check_words(f"stages.{name}", words)
    if local or shutil.which("sbatch") is None:
        return 0 if chosen.run_here() else 1
    for name, job in chosen.submit().items():
        print(f"{name}: job {job}")
    print(f"follow it with: megadistill campaign status {chosen.root}")
    return 0


def _campaign_status(chosen: "Campaign", _local: bool) -> int:
    from rich.console import Console

    from megadistill.launch.campaign import table

    Console().print(table(chosen.status()))
    return 0


def _campaign_cancel(chosen: "Campaign", _local: bool) -> int:
    jobs = chosen.cancel()
    print(f"cancelled: {', '.join(jobs) or 'nothing was in the queue'}")
    return 0


def _check_words(key: str, words: Sequence[str]) -> None:
    """A command line that could not even be read is refused before it is submitted."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            _parser().parse_args(words)
    except SystemExit:
        raise ValueError(f"{key}: {said.getvalue().splitlines()[-1]}") from None


def _check(arguments: argparse.Namespace, context: "NodeContext | None" = None) -> None:
    """Complain of all that is wrong before anything is allocated."""
    from megadistill.configfiles import check_run

    check_run(arguments.config, arguments.overrides, context, also=_check_on_export)


def _check_on_export(config: RunConfig) -> None:
    if (work := config.checkpoint.on_export) is not None:
        named = [] if work.config is None else [work.config]
        _check_words("checkpoint.on_export", [work.verb, *named, *work.args])


def config_show(arguments: argparse.Namespace) -> int:
    """The resolved configuration."""
    kind = KINDS[kind_of(arguments.config)]
    print(dump(load(kind, arguments.config, arguments.overrides)), end="")
    return 0


def config_check(arguments: argparse.Namespace) -> int:
    """Every problem of every file; with --models also what models, data and disk say."""
    from megadistill.configfiles import problem_of

    found = (problem_of(path, with_models=arguments.models) for path in arguments.configs)
    problems = [problem for problem in found if problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(arguments.configs) - len(problems)} of {len(arguments.configs)} files are valid")
    return 1 if problems else 0


def config_print_schema(arguments: argparse.Namespace) -> int:
    """The JSON schema, for editors."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Where a run stands: nodes, attempts, last steps, time left."""
    from megadistill.report.status import show, watch
    from megadistill.rundir import RunDir

    if arguments.watch:
        watch(RunDir(Path(arguments.run).absolute()), interval_s=1.0, give_up_s=arguments.give_up)
    else:
        show(_run_dir(arguments.run))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """A run's effect and cost: a table, a picture, and a page; of several runs, a page that compares."""
    from megadistill.report.writing import write_report

    write_report([_run_dir(path) for path in arguments.runs], arguments.picture, arguments.page)
    return 0


def probe(arguments: argparse.Namespace) -> int:
    """How coherent each branch's gradients are at a run's last checkpoint (CaMOPD section 4.4)."""
    from megadistill.evaluate.probe import write_probe

    write_probe(_run_dir(arguments.run), arguments.samples)
    return 0


def prepare_model(arguments: argparse.Namespace) -> int:
    """The small instruct model of the embedded run, as a Hugging Face directory in the cache."""
    from megadistill.convert.smollm2 import prepare_smollm2

    print(prepare_smollm2())
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Hugging Face to Megatron's distributed checkpoint, or back, in bounded memory; or FAPM: the part
    of a tuned model's changes of --model that is least to blame for forgetting."""
    from megadistill.convert.conversion import hf_to_megatron, megatron_to_hf
    from megadistill.convert.pruning import prune_change

    source, target, size = arguments.source, arguments.target, arguments.max_file_gb * 1e9
    if arguments.to == "fapm":
        if arguments.model is None:
            raise ValueError("convert fapm: --model is missing, the model before its tuning")
        print(prune_change(source, arguments.model, target, arguments.keep))
        return 0
    if arguments.to == "megatron":
        print(hf_to_megatron(source, target, max_file_bytes=size))
    else:
        print(megatron_to_hf(source, target, model=arguments.model, max_shard_bytes=size))
    return 0


def recipes_list(arguments: argparse.Namespace) -> int:
    """The configurations and job scripts that ship with the package."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, sentence in recipes.recipes().items():
        table.add_row(name, sentence)
    Console().print(table)
    return 0


def recipes_copy(arguments: argparse.Namespace) -> int:
    """Copy one, or a folder of them, with all that it includes or names, to begin from."""
    for path in recipes.copy(arguments.name, Path(arguments.directory)):
        print(path)
    return 0


def _run_dir(path: str) -> "RunDir":
    from megadistill.rundir import RunDir

    run = RunDir(Path(path).absolute())
    if not run.config_file.exists():
        raise ValueError(f"{path}: found no config.yaml, expected a run directory")
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megadistill", description="On-policy distillation on Slurm."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    takes.config(_verb(verbs, "train", train))
    takes.config(_verb(verbs, "node", node))
    takes.submit(_verb(verbs, "submit", submit))
    takes.campaign(_verb(verbs, "campaign", campaign))
    takes.config(_verb(verbs, "refine", refine))
    takes.eval(_verb(verbs, "eval", evaluate))
    takes.prepare(_verb(verbs, "prepare", prepare))
    command = _verb(verbs, "shard", shard)
    command.add_argument("directory", help="the shard's directory, e.g. ROOT/shards/KEY")
    _add_config_actions(verbs)
    takes.status(_verb(verbs, "status", status))
    takes.runs(_verb(verbs, "report", report))
    takes.doctor(_verb(verbs, "doctor", doctor))
    command = _verb(verbs, "probe", probe)
    command.add_argument("run", help="run directory")
    command.add_argument("--samples", type=int, default=32, help="most samples of a branch")
    _verb(verbs, "prepare-model", prepare_model)
    takes.convert(_verb(verbs, "convert", convert))
    _add_recipes_actions(verbs)
    version = f"megadistill {megadistill.__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def _add_config_actions(verbs: "Subparsers") -> None:
    command = verbs.add_parser("config", help="show, check, or describe configurations")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    takes.config(_verb(actions, "show", config_show))
    command = _verb(actions, "check", config_check)
    command.add_argument("configs", nargs="+", metavar="CONFIG")
    command.add_argument("--models", action="store_true", help="also check the models they name")
    _verb(actions, "schema", config_print_schema)


def _add_recipes_actions(verbs: "Subparsers") -> None:
    command = verbs.add_parser("recipes", help="list and copy what ships with the package")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    _verb(actions, "list", recipes_list)
    takes.recipe(_verb(actions, "copy", recipes_copy))


def _verb(verbs: "Subparsers", name: str, verb: Verb) -> argparse.ArgumentParser:
    text = (verb.__doc__ or "").strip()
    command: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    command.set_defaults(verb=verb)
    return command
