"""Tables for people: ruled on a terminal, aligned and whole when piped, nothing shortened.

Knows nothing of what is in them. What does not fit the terminal is folded between words; where even that is too wide,
each row becomes a block of lines of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from gateway.cli.output import safe

FOLDED_MIN = 20  # columns of the terminal that a word longer than that keeps
_GAP = 2


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str = "nothing") -> None:
    """A table: ruled and folded on a terminal; aligned, one line a row and whole when piped.

    Columns whose name begins with ">" are aligned right, without the mark.
    """
    if not rows:
        click.echo(empty)
        return
    cells = [[safe(str(cell)) for cell in row] for row in rows]
    names = [name.lstrip(">") for name in columns]
    right = [name.startswith(">") for name in columns]
    if sys.stdout.isatty():
        _print_ruled(names, right, cells)
    else:
        _print_plain(names, right, cells)


def _print_ruled(names: list[str], right: list[bool], cells: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    widths = _widths(names, right, cells, console.width)
    if widths is None:
        _print_blocks(names, cells)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for name, to_right, width in zip(names, right, widths, strict=True):
        table.add_column(Text(name), justify="right" if to_right else "left", overflow="fold", width=width)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _widths(names: list[str], right: list[bool], cells: list[list[str]], room: int) -> list[int] | None:
    """How wide each column is to be, that all fit in `room` columns of the terminal; None where they can't.

    Numbers are never folded, words only where they are long.
    """
    from rich.cells import cell_len

    widths, least = [], []
    for at, name in enumerate(names):
        column = [row[at] for row in cells]
        whole = max(map(cell_len, column))
        widths.append(max(whole, cell_len(name)))
        longest = whole if right[at] else min(FOLDED_MIN, _longest_word(column))
        least.append(max(longest, _longest_word([name])))
    excess = sum(widths) + _GAP * (len(widths) - 1) - room
    while excess > 0:
        slack, widest = max((width - limit, at) for at, (width, limit) in enumerate(zip(widths, least, strict=True)))
        if slack <= 0:
            return None
        widths[widest] -= 1
        excess -= 1
    return widths


def _longest_word(texts: list[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(word) for text in texts for word in text.split()), default=0)


def _print_blocks(names: list[str], cells: list[list[str]]) -> None:
    """A line for each cell, an empty line between rows."""
    width = max(map(len, names)) + _GAP
    blocks = ["".join(f"{name:{width}}{cell}\n" for name, cell in zip(names, row, strict=True)) for row in cells]
    sys.stdout.write("\n".join(blocks))


def _print_plain(names: list[str], right: list[bool], cells: list[list[str]]) -> None:
    widths = [max(len(row[n]) for row in [names, *cells]) for n in range(len(names))]
    lines = []
    for row in [names, *cells]:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip() + "\n")
    sys.stdout.write("".join(lines))
