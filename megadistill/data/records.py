"""A prompt with its answer kept apart, and how a question is put."""

from collections.abc import Mapping
from dataclasses import dataclass

from megadistill.config.rows import Message

MEDICAL_SYSTEM = (
    "You are a careful medical reasoning assistant. You give educational information, say what is "
    "uncertain, and recommend professional care when it is needed."
)
"""System message of CaMOPD's medical prompt (Fig. 7), in our words."""

MEDICAL_CHOICE = "Please reason step by step and give the final answer choice at the end."
MEDICAL_OPEN = (
    "Please reason step by step and answer clearly. Do not present the answer as a substitute for "
    "professional medical advice."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A prompt before any tokenizer has seen it, and its answer."""

    id: str
    prompt: str | tuple[Message, ...]
    """A question, or chat turns up to the answer."""
    options: Mapping[str, str] | None = None
    """Of a question: letter -> text."""
    answer: str | None = None
    part: str = ""
    """The share of a mixture to which it belongs."""
    index: int = 0
    """Position in a refinement's input."""
    problem: str | None = None
    """Why it is not refined."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat turns; of a question its text with the options below."""
        if not isinstance(self.prompt, str):
            return self.prompt
        return ({"role": "user", "content": "\n".join(self._lines())},)

    @property
    def medical_messages(self) -> tuple[Message, ...]:
        """CaMOPD's medical prompt: a question with options as a choice, without them as an open one."""
        if not isinstance(self.prompt, str):
            return self.prompt
        lines = [*self._lines(), MEDICAL_CHOICE if self.options else MEDICAL_OPEN]
        return (
            {"role": "system", "content": MEDICAL_SYSTEM},
            {"role": "user", "content": "\n".join(lines)},
        )

    @property
    def raw_answer(self) -> str:
        """The answer, of a record that must have one."""
        assert self.answer is not None, f"record {self.id!r} has no answer"
        return self.answer

    @property
    def question(self) -> str:
        """What a reader of one text needs: the user's turn, or the whole chat where it has more."""
        turns = self.messages
        if len(turns) == 1:
            return turns[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

    @property
    def bare_text(self) -> str:
        """What is compared with other texts: the prompt without system message, roles and letters."""
        if isinstance(self.prompt, str):
            return "\n".join([self.prompt, *(self.options or {}).values()])
        return "\n".join(turn["content"] for turn in self.prompt if turn["role"] != "system")

    def _lines(self) -> list[str]:
        assert isinstance(self.prompt, str)
        return [self.prompt, *(f"{key}. {text}" for key, text in (self.options or {}).items())]
