"""The configuration of `megadistill prepare`: from published data sets to the files that runs read."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megadistill.config.fields import Config, Fraction, Name, NaturalInt, PositiveInt
from megadistill.config.rows import RowConfig


class DataFilesConfig(Config):
    """Files of a data set: on the Hugging Face hub, or a user's own."""

    hub: str | None = None
    """`org/name` on the hub; read from the Hugging Face cache, which `--download-only` fills."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    files: list[str] = Field(default_factory=list)
    """Glob patterns inside the hub's repository, or paths as in `data.pools.NAME.sources` of a run."""
    licence: str = "unknown"
    """As the data card shall name it."""

    def contradictions(self) -> Iterator[str]:
        if not self.files:
            yield "files: found none, expected at least one pattern or path"


class PartConfig(Config):
    """One share of a mixture."""

    source: DataFilesConfig
    row: RowConfig = Field(default_factory=RowConfig)
    count: PositiveInt | None = None
    """Records of this part; absent: by `weight`, or all of them."""
    weight: PositiveInt | None = None
    """Its size, for a share of `total` in proportion."""


class MixtureConfig(Config):
    """Records drawn at random from each of several parts."""

    kind: Literal["mixture"] = "mixture"
    parts: dict[Name, PartConfig]
    total: PositiveInt | None = None
    """Records to share out over the parts in proportion to their weights, by largest remainder."""
    prompts: Literal["messages", "question"] = "messages"
    """Write chat turns as `messages`, or one text as `question`, with `options` beside it."""

    @property
    def sources(self) -> dict[str, DataFilesConfig]:
        """By the part that reads them."""
        return {name: part.source for name, part in self.parts.items()}

    def contradictions(self) -> Iterator[str]:
        weights = [part.weight for part in self.parts.values()]
        if not self.parts:
            yield "parts: found none, expected at least one"
        elif (self.total is None) == any(weights) or (self.total is not None and not all(weights)):
            yield "parts: found weights without `total` or the reverse; set all or none"


class ConversationsConfig(Config):
    """Conversations split by length: the longest become prompts, the rest supervised examples."""

    kind: Literal["conversations"] = "conversations"
    source: DataFilesConfig
    id: str | None = None
    messages: str = "conversations"
    """Field with the turns, `role`/`content` or `from`/`value`."""
    reserve: PositiveInt = 10_000
    """Conversations with the most turns, whose first n - 1 turns are the prompts."""
    min_turns: PositiveInt = 2
    """Shorter conversations are left out (a system message counts as a turn)."""
    sft_turns: Literal["last", "all"] = "last"
    """Which assistant turns of the others become examples."""

    @property
    def sources(self) -> dict[str, DataFilesConfig]:
        """By the part that reads them."""
        return {"conversations": self.source}


RecipeConfig = Annotated[MixtureConfig | ConversationsConfig, Field(discriminator="kind")]


class DuplicatesConfig(Config):
    """Removal of near duplicates: MinHash of word n-grams. It takes 6 kB of memory a record."""

    n: PositiveInt = 5
    """Words of an n-gram; a shorter text is one n-gram. In scripts that put no blanks between words
    (Chinese, Japanese, Thai) a character counts as a word."""
    threshold: Fraction = 0.8
    """Least estimated Jaccard similarity to an earlier record at which one is dropped."""


class ContaminationConfig(Config):
    """Removal of records that contain a benchmark's item, by the n-grams of words they share.

    It takes 200 bytes of memory for each word of the benchmarks.
    """

    benchmarks: dict[str, str]
    """Name of a benchmark -> its file, as in `benchmarks.NAME.path` of an evaluation."""
    n: PositiveInt = 13
    """Words of an n-gram; an item of fewer words, but `least`, counts as a whole."""
    share: Fraction = 0.2
    """Least share of an item's n-grams at which a record contains it."""
    least: PositiveInt = 8
    """Items with fewer words than this are not looked for; the card counts them."""


class PrepareConfig(Config):
    """One preparation; `megadistill prepare` takes exactly this."""

    name: Name
    """Names the files: `output_dir/NAME.jsonl`, `NAME.card.md`, `NAME.card.json`."""
    output_dir: str = "./data"
    mirror: str | None = None
    """Not read any more: what the hub has lies in the Hugging Face cache (HF_HOME)."""
    seed: int = 0
    recipe: RecipeConfig
    sft_name: Name | None = None
    """Names the second file of a split of conversations."""
    duplicates: DuplicatesConfig | None = Field(default_factory=DuplicatesConfig)
    """Absent (null): near duplicates stay."""
    contamination: ContaminationConfig | None = None
    tokenizer: str | None = None
    """Model whose tokenizer and chat template measure lengths; absent: words are counted."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """As `data.heldout_fraction` of the run that will read the file: the card counts both parts."""
    unusable: NaturalInt = 0
    """Rows without the fields or letters their format needs that may be left out, and are counted in
    the card; one more is an error."""
    max_line_mib: PositiveInt = 64
    """Longest line of an input file; a longer one is an error."""

    def contradictions(self) -> Iterator[str]:
        if isinstance(self.recipe, ConversationsConfig) != (self.sft_name is not None):
            yield "sft_name: expected exactly where recipe.kind is conversations"
