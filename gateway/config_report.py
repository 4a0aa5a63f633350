"""Collects what is wrong with a TOML file, and says it as `config_problems` has it.

Turns pydantic's errors into that form with the help of the tables themselves: their keys, descriptions and examples.
Knows no rule of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gateway.config_problems import SECRET_KEY, Problem
from gateway.toml_lines import Path as KeyPath


class Report:
    """Collects problems, and knows where each key stands, what the file says there and what `root` says of it."""

    def __init__(self, root: type[Any], file: str, raw: dict[str, Any], lines: dict[KeyPath, int]) -> None:
        self.problems: list[Problem] = []
        self._root = root
        self._file = file
        self._raw = raw
        self._lines = lines

    def add(self, loc: KeyPath, expected: str, write: str = "", *, missing: bool = False) -> None:
        """Note what is wrong at `loc`. `missing`: with what is not there."""
        found = "nothing" if missing else self._found(loc)
        self.problems.append(Problem(self._file, self._line(loc), dotted(loc), found, expected, write))

    def add_from_pydantic(self, kind: str, loc: KeyPath, ctx: Mapping[str, Any], message: str) -> None:
        """Note one of pydantic's errors, by its parts."""
        field = self._field(loc)
        if kind == "too_short" and self._value(loc):
            return  # pydantic counts only good elements; the bad ones have been told of
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            self.add(loc, *_unknown_key(self._root, loc))
        elif kind == "missing":
            self.add(loc, *_missing_key(loc, field), missing=True)
        elif kind == "lineside":
            write = ctx["write"] or _example(loc, field)
            self.add(loc, ctx["expected"], write if "=" in write.split('"')[0] else assign(loc, write))
        else:
            self.add(loc, *_builtin(kind, loc, ctx, message, field, self._value(loc)))

    def example(self, loc: KeyPath) -> str:
        """`key = value` with the model's example for that key; empty if it gives none."""
        return _example(loc, self._field(loc))

    def _field(self, loc: KeyPath) -> FieldInfo | None:
        walked = list(_tables_at(self._root, loc))
        return walked[-1][1] if walked else None

    def _line(self, loc: KeyPath) -> int:
        for length in range(len(loc), 0, -1):
            if loc[:length] in self._lines:
                return self._lines[loc[:length]]
        return 1

    def _value(self, loc: KeyPath) -> Any:
        here: Any = self._raw
        for step in loc:
            if isinstance(here, str):  # a word that may stand without the brackets of its array
                return here
            try:
                here = here[step]
            except (KeyError, IndexError, TypeError):
                return None
        return here

    def _found(self, loc: KeyPath) -> str:
        if loc and SECRET_KEY.search(str(loc[-1])) and loc[-1] != "password_file":
            return "a value that is not shown here"
        return _toml(self._value(loc))


def _toml(value: Any) -> str:
    """A value as the file would say it, shortened, and without passwords in URLs."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "an array of tables"
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = re.sub(r"//[^@/\"]*@", "//...@", text)
    return text if len(text) <= 100 else text[:97] + "..."


def dotted(loc: KeyPath) -> str:
    """`hub[0].urls[1]`"""
    out = ""
    for step in loc:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else step
    return out


def _is_table(annotation: Any) -> bool:
    """A model, or a dataclass that says how pydantic is to take it."""
    return isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or hasattr(annotation, "__pydantic_config__")
    )


def fields_of(table: type[Any]) -> dict[str, FieldInfo]:
    """The keys of a table as the file has them, in their order."""
    if issubclass(table, BaseModel):
        return {field.alias or name: field for name, field in table.model_fields.items()}
    found = {}
    for each in dataclasses.fields(table):
        if each.init:
            default = PydanticUndefined if each.default is dataclasses.MISSING else each.default
            field = FieldInfo.from_annotated_attribute(typing.cast(type, each.type), default)
            found[field.alias or each.name] = field
    return found


def _tables_at(root: type[Any], loc: KeyPath) -> Iterator[tuple[type[Any], FieldInfo | None]]:
    """Walk from the root down along `loc`: each table passed, with the field that the next step names in it."""
    table: type[Any] | None = root
    for step in loc:
        if isinstance(step, int):
            continue
        if table is None:
            return
        field = fields_of(table).get(step)
        yield table, field
        table = table_in(field.annotation) if field else None


def table_in(annotation: Any) -> type[Any] | None:
    if _is_table(annotation):
        return typing.cast(type[Any], annotation)
    return next((found for arg in typing.get_args(annotation) if (found := table_in(arg))), None)


def _header(key: str) -> str:
    return f"[[{key}]]" if key in ("hub", "outbound", "inbound", "access", "app", "step") else f"[{key}]"


def _unknown_key(root: type[Any], loc: KeyPath) -> tuple[str, str]:
    table = list(_tables_at(root, loc))[-1][0]
    name, known = str(loc[-1]), list(fields_of(table))
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1, 0.6)
    top = table is root
    expected = f"one of the {'tables' if top else 'keys'} {', '.join(known)}"
    if near:
        return expected, _header(near[0]) if top else near[0]
    elsewhere = [
        _header(key)
        for key, field in fields_of(root).items()
        if (inner := table_in(field.annotation)) and inner is not table and name in fields_of(inner)
    ]
    return expected, f"{name} under {' or '.join(elsewhere)}" if elsewhere else ""


def _missing_key(loc: KeyPath, field: FieldInfo | None) -> tuple[str, str]:
    description = field.description if field and field.description else "a value"
    if loc == ("gateway",):
        return description, f'{_header(str(loc[0]))} and id = "loco-4711" under it'
    return description, _example(loc, field)


def _example(loc: KeyPath, field: FieldInfo | None) -> str:
    if not field or not field.examples:
        return ""
    example = field.examples[0]
    return assign(loc, _toml(example[0] if isinstance(loc[-1], int) else example))


def assign(loc: KeyPath, value: str) -> str:
    """`key = value`, or the value alone for an element of an array."""
    return f"{loc[-1]} = {value}" if value and isinstance(loc[-1], str) else value


def _builtin(
    kind: str, loc: KeyPath, ctx: Mapping[str, Any], message: str, field: FieldInfo | None, found: Any
) -> tuple[str, str]:
    """What pydantic's own error means in this file."""
    example = _example(loc, field)
    name = str(loc[-1])
    if kind == "literal_error" and field is not None:
        options = [str(option) for option in typing.get_args(field.annotation)]
        near = difflib.get_close_matches(str(found).lower(), [option.lower() for option in options], 1, 0.6)
        fallback = field.default if isinstance(field.default, str) else options[0]
        hint = next((option for option in options if near and option.lower() == near[0]), fallback)
        return f"one of {', '.join(json.dumps(option) for option in options)}", assign(loc, json.dumps(hint))
    if kind == "tuple_type" and len(loc) == 1:
        return f"an array of tables, each under {_header(name)}", _header(name)
    if kind == "tuple_type":
        return "an array", assign(loc, f"[{_toml(found)}]" if isinstance(found, str) else "") or example
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return "a table", _header(next(step for step in loc if isinstance(step, str)))
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = ctx.get("ge", ctx.get("le"))
        return f"{'at least' if 'ge' in ctx else 'at most'} {bound}", assign(loc, str(bound))
    if kind == "int_type":
        digits = re.sub(r"\D", "", found) if isinstance(found, str) else ""
        return "a whole number, without quotes", assign(loc, digits) or example
    if kind == "bool_type":
        return "true or false, without quotes", assign(loc, "false" if str(found).lower() == "false" else "true")
    if kind in ("string_type", "path_type"):
        return "a string in quotes", example
    if kind in ("too_short", "string_too_short"):
        return f"at least {ctx['min_length']}", example
    if kind in ("too_long", "string_too_long"):
        return f"at most {ctx['max_length']}", ""
    return message[:1].lower() + message[1:], example
