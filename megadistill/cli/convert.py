"""Verbs that make checkpoints of checkpoints."""

from typing import Annotated

from typer import Argument, Option

from megadistill.cli.verbs import family, verb

convert = family(
    "convert",
    "Hugging Face to Megatron and back; merging; FAPM's pruning.",
    example="convert megatron Qwen/Qwen3-8B ckpt/",
)

Target = Annotated[str, Argument(metavar="TARGET", help="directory to write; must not exist")]
MaxFileGb = Annotated[float, Option(metavar="GB", help="Size of one file.")]


@verb(convert, example="convert megatron Qwen/Qwen3-8B ckpt/")
def megatron(
    source: Annotated[str, Argument(help="Hugging Face directory, or name on the hub")],
    target: Target,
    max_file_gb: MaxFileGb = 5,
) -> None:
    """Hugging Face to Megatron's distributed checkpoint, in bounded memory."""
    from megadistill.convert.conversion import hf_to_megatron

    print(hf_to_megatron(source, target, max_file_bytes=max_file_gb * 1e9))


@verb(convert, example="convert hf ckpt/ out/ --model Qwen/Qwen3-8B")
def hf(
    source: Annotated[str, Argument(help="Megatron checkpoint")],
    target: Target,
    model: Annotated[
        str | None, Option(help="Has configuration and tokenizer, if the source has not.")
    ] = None,
    max_file_gb: MaxFileGb = 5,
) -> None:
    """Megatron's distributed checkpoint to Hugging Face, in bounded memory."""
    from megadistill.convert.conversion import megatron_to_hf

    print(megatron_to_hf(source, target, model=model, max_shard_bytes=max_file_gb * 1e9))


@verb(convert, example="convert fapm runs/sft/export pruned/ --model Qwen/Qwen3-8B --keep 0.1")
def fapm(
    source: Annotated[str, Argument(help="the tuned model")],
    target: Target,
    model: Annotated[str, Option(help="The model before tuning.")],
    keep: Annotated[float, Option(help="Share of the changes that stay.")] = 0.1,
) -> None:
    """FAPM: the part of a tuned model's changes that is least to blame for forgetting."""
    from megadistill.convert.pruning import prune_change

    print(prune_change(source, model, target, keep))


@verb(convert, example="convert merge runs/a/export runs/b/export merged/ --model BASE")
def merge(
    sources: Annotated[list[str], Argument(help="the models, at least two")],
    target: Target,
    weight: Annotated[
        list[float] | None, Option(help="Of each model in turn; without it all count alike.")
    ] = None,
    model: Annotated[
        str | None, Option(help="What all were tuned from: TIES instead of the weighted mean.")
    ] = None,
    keep: Annotated[
        float | None,
        Option(help="TIES: share of each model's changes that stays, 0.2 if not given."),
    ] = None,
    scale: Annotated[
        float | None,
        Option(help="TIES: lambda, which multiplies the merged change, 1 if not given."),
    ] = None,
) -> None:
    """One model out of several of one shape: the weighted mean, or TIES against a base."""
    from megadistill.convert.merging import merge_linear, merge_ties

    ties = {name: value for name, value in (("keep", keep), ("scale", scale)) if value is not None}
    if model is None and ties:
        raise ValueError(
            f"--{next(iter(ties))}: found it without --model, expected TIES's base, too"
        )
    if model is None:
        print(merge_linear(sources, target, weight))
    elif weight:
        raise ValueError("--weight: found it beside --model, expected one of them: TIES has none")
    else:
        print(merge_ties(sources, model, target, **ties))
