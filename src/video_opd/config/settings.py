"""The base of all settings classes: frozen, strict, and refused with one line that says where and why."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from video_opd.config.messages import one_line
from video_opd.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


class Settings(BaseModel):
    """A section of settings, or a tree of sections.

    A wrong value raises pydantic's ``ValidationError`` where an instance is made in code. Values of a user
    go through :func:`read_settings`, which raises :class:`UserError` instead. A field's description explains
    it in an editor and in the message that refuses a value out of range, so it is a phrase, not a sentence.
    A check of several fields is a validator whose message begins with a field's name: the section is put in
    front of it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _accept_an_empty_section(cls, tree: Any) -> Any:
        return {} if tree is None else tree

    def changed(self, **changes: Any) -> Self:
        """A checked copy: ``video.changed(fps=1.0)``, ``recipe.changed(**{"model.path": "m"})``.

        What was not given is decided anew: a default may follow from a setting that is changed.
        """
        tree = self.given()
        for key, value in changes.items():
            *sections, name = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return read_settings(type(self), tree)

    def given(self) -> dict[str, Any]:
        """The settings that were given, as nested dicts; those that are defaults are left out."""
        return self.model_dump(exclude_unset=True)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts and lists, as YAML and JSON have them, in the order of the fields."""
        return self.model_dump(mode="json")


S = TypeVar("S", bound=Settings)


def read_settings(kind: type[S], tree: Any) -> S:
    """An instance of ``kind`` from nested mappings. Raises :class:`UserError` for the first mistake."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(one_line(error, kind)) from error


# ------------------------------------------------------------------------------ values as YAML spells them


def _number(value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-6 as text
            value = float(value)
    if isinstance(value, float) and math.isnan(value):
        raise PydanticCustomError("float_type", "not a number")
    return value


def _one_or_several(value: Any) -> Any:
    """One value stands for a list of one. Text with commas is most likely a list that lacks its brackets."""
    if value is None or (isinstance(value, str) and "," in value):
        return value  # refused, because it is no tuple
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _one_or_several_texts(value: Any) -> Any:
    return (
        (value,) if isinstance(value, str) else _one_or_several(value)
    )  # the name of a file may have commas


def _text_keys(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    named = {str(key): item for key, item in value.items()}
    if len(named) != len(value):
        raise PydanticCustomError("repeated_key", "two keys have the same name")
    return named


number = BeforeValidator(_number)
Number = Annotated[float, number]
Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_several_texts)]
TextByText = Annotated[dict[str, Annotated[str, Field(min_length=1)]], BeforeValidator(_text_keys)]
several = BeforeValidator(_one_or_several)
