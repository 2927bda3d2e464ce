"""The settings for reading a row of a user's data, shared by runs, `prepare` and `refine`."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from megadistill.config.fields import Config

Message = Mapping[str, str]
"""One chat turn: `{"role": ..., "content": ...}`."""
RowFormat = Literal["auto", "messages", "pairs", "instruction", "choices", "medmcqa"]


class Location(NamedTuple):
    """Where rows lie."""

    kind: Literal["data", "dataset"]
    name: str
    revision: str | None = None


class RowConfig(Config):
    """Which format a row has, and which fields hold what."""

    format: RowFormat = "messages"
    """`messages`: chat turns (`role` and `content`, or `from` and `value`), the last assistant turn is
    the answer; `pairs`: question and answer; `instruction`: instruction, input, output; `choices`: a
    question with lettered options (a mapping, a list, or lines `A. ...`) and the right letter or text;
    `medmcqa`: opa to opd and cop; `auto`: whichever of the first three the row's fields allow."""
    id: str | None = None
    """Field that identifies a row; absent, from the row too: file name and row number."""
    question: str = "question"
    answer: str = "answer"
    options: str = "options"
    """May be the question's own field, where the options stand in its last lines."""
    messages: str = "messages"
    instruction: str = "instruction"
    instruction_input: str = "input"
    output: str = "output"
    letters_from: Literal[0, 1] = 0
    """Number that stands for A in `cop` (the hub's files count from 0, MIRAGE's from 1)."""
    open_ended: bool = False
    """Ask without the options (`choices`, `medmcqa`)."""
