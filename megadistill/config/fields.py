"""The base class of all configuration: strict and immutable; numbers with bounds."""

import json
from collections.abc import Iterable
from typing import Annotated, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Becomes the name of a file, a directory or a job."""


class Config(BaseModel):
    """A configuration or a section of one: immutable, without unknown keys or contradictions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,  # they are the descriptions in the schema
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, tree: object) -> object:
        """Text that looks like a whole number or a truth value, such as a run called 7."""
        if not isinstance(tree, dict):
            return tree
        return {key: _as_text(cls.model_fields.get(key), value) for key, value in tree.items()}

    def contradictions(self) -> Iterable[str]:
        """Settings that are right one by one but not together, each as `key: what is wrong`."""
        return ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if problems := list(self.contradictions()):
            raise ValueError("\n".join(problems))
        return self


def _as_text(field: FieldInfo | None, value: object) -> object:
    if field is None:
        return value
    if isinstance(value, int) and field.annotation in (str, str | None):
        return json.dumps(value)
    if isinstance(value, dict) and get_args(field.annotation)[-1:] == (str,):
        return {k: json.dumps(v) if isinstance(v, int) else v for k, v in value.items()}
    return value
