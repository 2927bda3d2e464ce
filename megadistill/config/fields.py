"""What every configuration class is made of: strictness, and numbers with bounds."""

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Becomes the name of a file, a directory or a job."""


class Config(BaseModel):
    """A configuration or a section of one: immutable, without unknown keys or contradictions."""

    # A docstring under a field is its description in the schema.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def contradictions(self) -> Iterable[str]:
        """Settings that are right one by one but not together, each as `key: what is wrong`."""
        return ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if problems := list(self.contradictions()):
            raise ValueError("\n".join(problems))
        return self
