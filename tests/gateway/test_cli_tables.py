"""Tables on terminals of every width: whole words, whole numbers, nothing left out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

import pytest

from gateway.cli.tables import print_table

COLUMNS = ["stream", "direction", "class", ">waiting", ">stored", ">size", ">next seq", ">full", ">in flight"]
ROWS = [
    ["telemetry", "outbound", "normal 20 %", 123456, 123456, "64.0 KiB", 123457, "12 %", 1000],
    ["commands", "inbound", "-", 0, 0, "0 B", 1, "0 %", 0],
]

Shown = Callable[..., list[str]]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The lines that a terminal of some width is given."""

    def lines(width: int, columns: Sequence[str] = COLUMNS, rows: Sequence[Sequence[object]] = ROWS) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        print_table(columns, rows)
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return lines


@pytest.mark.parametrize("width", [120, 90, 80, 60, 20, 1])
def test_no_word_and_no_number_is_broken(shown: Shown, width: int) -> None:
    words = " ".join(shown(width)).split()
    for cell in [*(name.lstrip(">") for name in COLUMNS), *(str(cell) for row in ROWS for cell in row)]:
        assert set(cell.split()) <= set(words), (cell, width)


def test_eighty_columns_hold_the_table_of_streams(shown: Shown) -> None:
    lines = shown(80)
    assert max(map(len, lines)) <= 80
    assert any("123456" in line and "1000" in line for line in lines if line.startswith("telemetry"))


def test_a_terminal_too_narrow_for_the_table_gets_a_block_for_each_row(shown: Shown) -> None:
    lines = shown(40)
    assert lines[0].split() == ["stream", "telemetry"]
    assert lines.index("") == len(COLUMNS)
    assert len(lines) == 2 * len(COLUMNS) + 1


def test_a_long_word_is_folded_and_whole(shown: Shown) -> None:
    topic = "".join(chr(97 + n % 26) for n in range(200))
    lines = shown(60, [">seq", "topic"], [[1, topic]])
    assert "".join(line[3:].strip() for line in lines[2:]) == topic
