"""Verbs that make what runs read: training sets, refined answers, the small model."""

from typing import Annotated

from typer import Option

from megadistill.cli.verbs import Overrides, Source, Wait, app, verb
from megadistill.config import PrepareConfig, RefineConfig, load


@verb(app, example="prepare configs/prepare/nemotron_10k.yaml --download-only")
def prepare(
    config: Source,
    overrides: Overrides = None,
    download_only: Annotated[
        bool,
        Option(
            "--download-only",
            help="Only copy what the hub has into the Hugging Face cache.",
        ),
    ] = False,
) -> None:
    """Make training sets from published data sets."""
    from megadistill.prepare.pipeline import run_preparation

    settings = load(PrepareConfig, config, overrides or ())
    print(run_preparation(settings, download_only=download_only))


@verb(app, example="refine configs/embedded/raft_refine.yaml")
def refine(config: Source, overrides: Overrides = None, wait: Wait = False) -> None:
    """RAFT's stage 1: rewrite, filter and fuse answers. Again, it does what is not done."""
    from megadistill.refine.pipeline import run_refinement

    print(run_refinement(load(RefineConfig, config, overrides or ()), wait=wait))


@verb(app, "prepare-model", example="prepare-model")
def prepare_model() -> None:
    """The embedded run's small model. A Hugging Face directory in the cache; prints its path."""
    from megadistill.convert.smollm2 import prepare_smollm2

    print(prepare_smollm2())
