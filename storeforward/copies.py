"""What a row of a small table says of itself a second and a third time (`copies`, storeforward/schema.py).

Values in, values out: knows no SQL but the literals that `quote` writes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from storeforward.pages import Value
from storeforward.schema import CHECKED, COPIES_BETWEEN

_LITERAL = re.compile(r",(?:NULL|(-?\d+)|'((?:[^']|'')*)'|X'((?:[0-9A-F]{2})*)')", re.DOTALL)
_TWICE = "|".join(table for table, (times, _) in CHECKED.items() if times > 1)
_COPY = re.compile(
    rb"(%b)(?:,(?:NULL|-?\d+|'(?:[^']|'')*'|X'(?:[0-9A-F]{2})*'))+" % _TWICE.encode(),
    re.DOTALL,
)


def as_text(table: str, values: Sequence[Value]) -> str:
    """One copy of these values, as SQL makes it."""
    return table + "".join(f",{_quoted(value)}" for value in values)


def _quoted(value: Value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"X'{value.hex().upper()}'"
    if isinstance(value, str):
        return "'" + value.partition("\0")[0].replace("'", "''") + "'"
    return str(value)


def values_of(table: str, text: str) -> tuple[Value, ...] | None:
    """The reverse; None for what is no copy of that table's rows."""
    at = len(table)
    if text[:at] != table:
        return None
    values: list[Value] = []
    while at < len(text):
        match = _LITERAL.match(text, at)
        if match is None:
            return None
        number, string, blob = match.groups()
        if number is not None:
            values.append(int(number))
        elif string is not None:
            values.append(string.replace("''", "'"))
        else:
            values.append(None if blob is None else bytes.fromhex(blob))
        at = match.end()
    return tuple(values) if len(values) == len(CHECKED[table][1]) else None


def right_values(table: str, values: Sequence[Value], told: Value) -> tuple[Value, ...] | None:
    """What was written, by the row's own `values` and by what `copies` has; None where no two of them agree."""
    texts = [as_text(table, values)]
    if isinstance(told, str):
        if CHECKED[table][0] == 1:
            texts.append(told)
        else:
            half = len(told) // 2
            # A flipped bit changes no length, but it may look like what stands between the two.
            texts += [told[:half], told[half + len(COPIES_BETWEEN) :]]
    text, agreed = Counter(texts).most_common(1)[0]
    return values_of(table, text) if agreed > 1 else None


def found_in(text: bytes) -> list[tuple[str, tuple[Value, ...]]]:
    """Tables and rows of which two copies stand side by side in these bytes, whatever became of the row around them."""
    out = []
    for match in _COPY.finditer(text):
        once = match.group()
        if text.startswith(COPIES_BETWEEN.encode() + once, match.end()):
            table = match.group(1).decode()
            values = values_of(table, once.decode(errors="surrogateescape"))
            if values is not None:
                out.append((table, values))
    return out


def table_of(told: Value) -> str | None:
    """Whose copies this can be."""
    if not isinstance(told, str):
        return None
    for text in (told, told[len(told) // 2 + 1 :]):
        table = text.partition(",")[0]
        if table in CHECKED:
            return table
    return None
