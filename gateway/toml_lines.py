"""Finds the line on which each key of a TOML document stands.

Reads a document that `tomllib` has already accepted, so it only has to skip values, not to judge them. Knows
nothing of what the keys mean.
"""

from __future__ import annotations

Path = tuple[str | int, ...]

_BARE_END = frozenset(",]}#\n")


def key_lines(text: str) -> dict[Path, int]:
    """Return the line (from 1) of every table, key and array element, by its path from the top.

    A table's own path maps to its header. Elements of arrays are numbered from 0, `[[hub]]` tables likewise:
    `("hub", 0, "urls", 1)` is the second URL of the first hub.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._at = 0
        self._line = 1
        self._lines: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        base: Path = ()
        while self._skip(blank_lines=True):
            line = self._line
            if self._text.startswith("[[", self._at):
                self._move(2)
                path = self._inside(self._key())
                self._arrays[path] = self._arrays.get(path, -1) + 1
                self._lines.setdefault(path, line)
                base = (*path, self._arrays[path])
                self._note(base, line)
                self._move(2)
            elif self._text[self._at] == "[":
                self._move(1)
                base = self._inside(self._key())
                self._note(base, line)
                self._move(1)
            else:
                self._pair(base)
        return self._lines

    def _inside(self, names: list[str]) -> Path:
        """The path of a header: `[hub.tls]` after `[[hub]]` is about the last hub."""
        path: Path = ()
        for depth, name in enumerate(names):
            path = (*path, name)
            if depth < len(names) - 1 and path in self._arrays:
                path = (*path, self._arrays[path])
        return path

    def _note(self, path: Path, line: int) -> None:
        """Remember a path, and every table above it that no header has named."""
        self._lines[path] = line
        for length in range(1, len(path)):
            self._lines.setdefault(path[:length], line)

    def _pair(self, base: Path) -> None:
        line = self._line
        path = (*base, *self._key())
        self._note(path, line)
        self._move(1)  # the equals sign
        self._skip()
        self._value(path)

    def _key(self) -> list[str]:
        """Read a dotted key and the blanks after it; stop at `=` or `]`."""
        names: list[str] = []
        while True:
            self._skip()
            if self._text[self._at] in "\"'":
                names.append(self._string())
            else:
                start = self._at
                while self._text[self._at].isalnum() or self._text[self._at] in "_-":
                    self._move(1)
                names.append(self._text[start : self._at])
            self._skip()
            if self._text[self._at] != ".":
                return names
            self._move(1)

    def _value(self, path: Path) -> None:
        first = self._text[self._at]
        if first in "\"'":
            self._string()
        elif first == "[":
            self._array(path)
        elif first == "{":
            self._inline_table(path)
        else:
            while self._at < len(self._text) and self._text[self._at] not in _BARE_END:
                self._move(1)

    def _array(self, path: Path) -> None:
        self._move(1)
        number = 0
        while self._skip(blank_lines=True) and self._text[self._at] != "]":
            if self._text[self._at] == ",":
                self._move(1)
                continue
            self._lines[(*path, number)] = self._line
            self._value((*path, number))
            number += 1
        self._move(1)

    def _inline_table(self, path: Path) -> None:
        self._move(1)
        while self._skip(blank_lines=True) and self._text[self._at] != "}":
            if self._text[self._at] == ",":
                self._move(1)
                continue
            self._pair(path)
        self._move(1)

    def _string(self) -> str:
        """Skip a string of any of the four kinds; return its content (escapes read for one-line strings)."""
        quote = self._text[self._at]
        escapes = quote == '"'
        mark = quote * 3 if self._text.startswith(quote * 3, self._at) else quote
        self._move(len(mark))
        start = self._at
        while not self._text.startswith(mark, self._at):
            self._move(2 if escapes and self._text[self._at] == "\\" else 1)
        if len(mark) == 3:  # up to two quotes may stand just before the closing three
            while self._text.startswith(quote, self._at + 3):
                self._move(1)
        raw = self._text[start : self._at]
        self._move(len(mark))
        return _unescape(raw) if escapes and len(mark) == 1 else raw

    def _skip(self, *, blank_lines: bool = False) -> bool:
        """Skip blanks (and newlines and comments); false at the end of the text."""
        while self._at < len(self._text):
            here = self._text[self._at]
            if here in " \t" or (blank_lines and here == "\n"):
                self._move(1)
            elif blank_lines and here == "#":
                while self._at < len(self._text) and self._text[self._at] != "\n":
                    self._move(1)
            else:
                return True
        return False

    def _move(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count


def _unescape(raw: str) -> str:
    if "\\" not in raw:
        return raw
    import tomllib  # a key with an escape in it is rare enough to ask the real parser

    value = tomllib.loads(f'x = "{raw}"')["x"]
    assert isinstance(value, str)
    return value
