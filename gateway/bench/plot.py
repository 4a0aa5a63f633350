"""A picture of a run: one panel a case, one bar a contender, the targets below. Rows in, SVG text out; no library."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from gateway.bench.rows import Row
from gateway.bench.targets import OURS, Judged

WIDTH = 960
LABEL = 190
BARS = 520
LINE = 22
PAD = 24
INK, QUIET, OUR_BAR, THEIR_BAR, MET, MISSED = "#1b2733", "#5c6b7a", "#1f6feb", "#b6c2cf", "#1a7f37", "#c62828"


def show(value: float, unit: str) -> str:
    """A figure for people."""
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    if unit == "/s":
        return f"{value:,.0f} /s"
    return f"{value:.3g} {unit}"


def plain(value: float) -> str:
    """A number to four places, never with an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def svg(rows: Sequence[Row], judged: Sequence[Judged], title: str) -> str:
    """The whole picture. Only cases with a figure are drawn."""
    parts: list[str] = []
    y = PAD + 20
    parts.append(_text(PAD, y, "lineside bench", size=20, weight=600))
    y += 22
    parts.append(_text(PAD, y, title, colour=QUIET))
    y += 18
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.rounds:
            cases.setdefault((row.measure, row.case, row.unit), []).append(row)
    measure = ""
    for (name, case, unit), group in cases.items():
        if name != measure:
            measure = name
            y += 26
            parts.append(_text(PAD, y, name, size=15, weight=600))
            y += 6
        y += LINE
        parts.append(_text(PAD, y, case, colour=QUIET, size=12))
        most = max(row.value or 0.0 for row in group) or 1.0
        for row in group:
            y += LINE
            parts += _bar(row, unit, most, y)
    y += 40
    parts.append(_text(PAD, y, "targets", size=15, weight=600))
    for each in judged:
        y += LINE
        parts += _target(each, y)
    height = y + PAD
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" role="img">\n<title>{escape(title)}</title>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _bar(row: Row, unit: str, most: float, y: int) -> list[str]:
    value = row.value or 0.0
    length = max(1.0, BARS * value / most)
    ours = row.who == OURS
    figure = show(value, unit)
    if row.ratio is not None:
        figure += f"  (ours {row.ratio:.2f} ×)"
    drawn = [
        _text(PAD + LABEL - 10, y, row.who, anchor="end", weight=600 if ours else 400),
        f'<rect x="{PAD + LABEL}" y="{y - 13}" width="{length:.1f}" height="16" rx="2" '
        f'fill="{OUR_BAR if ours else THEIR_BAR}"><title>{escape(row.durability or row.who)}</title></rect>',
    ]
    if len(row.rounds) > 1:  # the spread of the rounds, as a line over the bar
        low, high = (PAD + LABEL + BARS * min(edge, most) / most for edge in (min(row.rounds), max(row.rounds)))
        drawn.append(f'<path d="M{low:.1f} {y - 5}H{high:.1f}" stroke="{INK}" stroke-width="1.5"/>')
    drawn.append(_text(PAD + LABEL + BARS + 10, y, figure))
    return drawn


def _target(each: Judged, y: int) -> list[str]:
    word, colour = {True: ("met", MET), False: ("missed", MISSED), None: ("not measured", QUIET)}[each.met]
    measured = "-" if each.measured is None else f"{plain(each.measured)} {each.unit}"
    return [
        _text(PAD, y, each.what),
        _text(PAD + 480, y, each.wanted, anchor="end", colour=QUIET),
        _text(PAD + 640, y, measured, anchor="end"),
        _text(PAD + 670, y, word, colour=colour, weight=600),
    ]


def _text(
    x: float, y: float, text: str, *, size: int = 13, weight: int = 400, colour: str = INK, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
