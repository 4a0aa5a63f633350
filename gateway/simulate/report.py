"""The report of a simulation: one HTML page that needs nothing else, with its curves drawn as SVG.

Values in, text out. Backlog, rate, latency and link state stand under one another on one axis of time.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import pairwise

from gateway.simulate.runner import Result, Sample
from gateway.simulate.view import amount

WIDTH, HEIGHT = 920, 150
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 10, 24
LINE_HEIGHT = 34
POINTS_MAX = 1500
TICKS = 8

# One colour a kind of line, told apart without seeing red and green too: bad ones are dark or hatched in the legend.
COLOURS = {
    "up": "#cfe8d5",
    "tunnel": "#4a4a55",
    "tunnel-fin": "#7d7d8c",
    "reset": "#c2514a",
    "half-open": "#b07aa1",
    "flapping: closed": "#7d7d8c",
    "flapping: open": "#cfe8d5",
    "stall": "#e0a34a",
    "acks-lost": "#d98150",
    "hub-restart": "#5b7fa8",
    "hub-slow": "#9db7d5",
}

NARROW = "#8fbf9f"

STYLE = """
:root { color-scheme: light dark; --ink: #20242a; --paper: #fff; --faint: #d8dce2;
  --curve: #1f5fa8; --curve2: #c76b1f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #16191d; --faint: #3a4048; --curve: #6fb1f5; --curve2: #f0a35e; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0.2em; } h2 { font-size: 1.05em; margin: 1.4em 0 0.3em; }
p.about { margin-top: 0; opacity: 0.8; }
.word { display: inline-block; padding: 0.25em 0.8em; border-radius: 0.3em; font-weight: 600; color: #fff; }
.kept { background: #2c7a4b; } .broken { background: #b3352c; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25em 0.9em 0.25em 0; text-align: left; border-bottom: 1px solid var(--faint); }
th.n, td.n { text-align: right; }
tr.bad td { color: #b3352c; font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--faint); stroke-width: 1; } .curve { fill: none; stroke: var(--curve); stroke-width: 1.6; }
.curve2 { fill: none; stroke: var(--curve2); stroke-width: 1.6; } .area { fill: var(--curve); opacity: 0.14; }
.legend span { display: inline-block; margin-right: 1.2em; }
.legend i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.35em; vertical-align: -0.1em;
  border: 1px solid var(--faint); }
.facts { opacity: 0.8; }
"""

Curve = list[tuple[float, float | None]]


def render(result: Result) -> str:
    """The whole page."""
    samples = _thinned(result.samples)
    end_s = max(samples[-1].at_s if samples else 0.0, 0.1)
    word = '<span class="word kept">Every promise held</span>'
    if not result.kept:
        word = '<span class="word broken">A promise broke</span>'
    backlog: Curve = [(s.at_s, float(s.backlog)) for s in samples]
    p50: Curve = [(s.at_s, s.latency_p50_s) for s in samples]
    p99: Curve = [(s.at_s, s.latency_p99_s) for s in samples]
    sent, came = _rate(samples, "published"), _rate(samples, "delivered")
    count = result.scenario.gateways.count
    cuts = f"{result.cuts} cut{'s' * (result.cuts != 1)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(result.scenario.title)} – Lineside</title><style>{STYLE}</style></head><body>",
        f"<h1>{_text(result.scenario.title)}</h1>",
        f'<p class="about">{_text(result.scenario.about)}</p>' if result.scenario.about else "",
        f"<p>{word}</p>",
        f'<p class="facts">{count} gateway{"s" * (count > 1)}, {cuts} in {result.seconds:.0f} s '
        f"(durations × {result.scale:g}), line broken by {_text(result.proxy)}.</p>",
        "<h2>Line</h2>",
        _line(result, end_s),
        _legend(result),
        "<h2>Links up, gateways</h2>",
        _chart([("curve", [(s.at_s, float(s.links_up)) for s in samples])], end_s, "gateways", step=True),
        "<h2>Backlog, messages</h2>",
        _chart([("curve", backlog)], end_s, "messages", area=True),
        "<h2>Rate, messages a second</h2>",
        _chart([("curve2", sent), ("curve", came)], end_s, "messages/s"),
        _key(("--curve2", "published"), ("--curve", "delivered")),
        "<h2>Time on the way to the hub, seconds</h2>",
        _chart([("curve2", p99), ("curve", p50)], end_s, "s", log=True),
        _key(("--curve2", "99 % faster"), ("--curve", "median")),
        "<h2>Verdict</h2>",
        _verdict(result),
        "<h2>Messages</h2>",
        _messages(result),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """At most POINTS_MAX of them, the last among them."""
    every = max(1, math.ceil(len(samples) / POINTS_MAX))
    kept = list(samples[::every])
    if samples and kept[-1] is not samples[-1]:
        kept.append(samples[-1])
    return kept


def _rate(samples: Sequence[Sample], what: str) -> Curve:
    curve: Curve = []
    for before, after in pairwise(samples):
        seconds = after.at_s - before.at_s
        if seconds > 0.01:
            curve.append((after.at_s, (getattr(after, what) - getattr(before, what)) / seconds))
    return curve


def _x(at_s: float, end_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * at_s / end_s


def _nice(value: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999999)


def _ticks(end_s: float) -> list[float]:
    step = _nice(end_s / TICKS)
    return [step * number for number in range(int(end_s / step) + 1)]


def _clock(at_s: float) -> str:
    if at_s >= 120:
        return f"{int(at_s) // 60}:{int(at_s) % 60:02d}"
    return f"{at_s:g} s"


def _colour(link: str) -> str:
    """By its first word; a line that is up and narrow is a darker green than one without bounds."""
    name, _, shape = link.partition(",")
    if name == "up" and "kbit/s" in shape:
        return NARROW
    return COLOURS.get(name, "#999")


def _line(result: Result, end_s: float) -> str:
    """A band in the colours of the line's states."""
    out = [f'<svg viewBox="0 0 {WIDTH} {LINE_HEIGHT + 18}" role="img" aria-label="state of the line over time">']
    marks = [*result.marks]
    for number, mark in enumerate(marks):
        until = marks[number + 1].at_s if number + 1 < len(marks) else end_s
        x, x2 = _x(min(mark.at_s, end_s), end_s), _x(min(until, end_s), end_s)
        title = f"{mark.link}, {mark.at_s:.1f} to {until:.1f} s"
        out.append(
            f'<rect x="{x:.1f}" y="4" width="{max(0.4, x2 - x):.1f}" height="{LINE_HEIGHT - 8}" '
            f'fill="{_colour(mark.link)}"><title>{_text(title)}</title></rect>'
        )
    out += [
        f'<text x="{_x(at, end_s):.1f}" y="{LINE_HEIGHT + 12}" text-anchor="middle">{_clock(at)}</text>'
        for at in _ticks(end_s)
    ]
    return "".join([*out, "</svg>"])


def _legend(result: Result) -> str:
    seen = dict.fromkeys(mark.link for mark in result.marks)
    return (
        '<p class="legend">'
        + "".join(f'<span><i style="background:{_colour(link)}"></i>{_text(link)}</span>' for link in seen)
        + "</p>"
    )


def _key(*entries: tuple[str, str]) -> str:
    spans = "".join(f'<span><i style="background:var({colour})"></i>{_text(name)}</span>' for colour, name in entries)
    return f'<p class="legend">{spans}</p>'


def _chart(
    curves: Sequence[tuple[str, Curve]],
    end_s: float,
    unit: str,
    *,
    area: bool = False,
    log: bool = False,
    step: bool = False,
) -> str:
    values = [value for _, curve in curves for _, value in curve if value is not None]
    if not values:
        return '<p class="facts">Nothing was measured.</p>'
    low, high, marks = _scale(values, log, whole=step)
    bottom = HEIGHT - BOTTOM

    def y(value: float) -> float:
        if log:
            share = (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        else:
            share = value / high
        return bottom - (bottom - TOP) * min(1.0, max(0.0, share))

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(unit)} over time">']
    for mark in marks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{_figure(mark)}</text>')
    for at in _ticks(end_s):
        out.append(f'<text x="{_x(at, end_s):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{_clock(at)}</text>')
    for name, curve in curves:
        for run in _runs(curve):
            points = [(_x(at, end_s), y(value)) for at, value in run]
            if step:
                points = [
                    each for a, b in zip(points, [*points[1:], points[-1]], strict=True) for each in (a, (b[0], a[1]))
                ]
            text = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            if area:
                out.append(
                    f'<polygon class="area" points="{points[0][0]:.1f},{bottom} {text} {points[-1][0]:.1f},{bottom}"/>'
                )
            if len(points) == 1:
                out.append(f'<circle class="{name}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="1.2"/>')
            else:
                out.append(f'<polyline class="{name}" points="{text}"/>')
    return "".join([*out, "</svg>"])


def _scale(values: Sequence[float], log: bool, *, whole: bool = False) -> tuple[float, float, list[float]]:
    """Lowest and highest of the axis, and where it is marked."""
    if not log:
        high = _nice(max(values))
        return 0.0, high, [0.0, high] if whole else [0.0, high / 2, high]
    low = 10.0 ** math.floor(math.log10(max(min(values), 1e-4)))
    high = max(low * 10, 10.0 ** math.ceil(math.log10(max(max(values), 1e-4))))
    decades = round(math.log10(high / low))
    return low, high, [low * 10**n for n in range(decades + 1)]


def _runs(curve: Curve) -> list[list[tuple[float, float]]]:
    """The curve where it has values: a gap stays a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in curve:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((at, value))
    return [run for run in runs if run]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:g}"


def _verdict(result: Result) -> str:
    rows = [
        f"<tr{'' if each.kept else ' class=bad'}><td>{_text(each.promise)}</td><td>{_text(each.what)}</td>"
        f'<td class="n">{_text(amount(each.measured, each.unit))}</td>'
        f'<td class="n">{_text(amount(each.limit, each.unit))}</td><td>{"kept" if each.kept else "broken"}</td></tr>'
        for each in result.verdict
    ]
    head = '<tr><th>Promise</th><th></th><th class="n">Measured</th><th class="n">Limit</th><th></th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _messages(result: Result) -> str:
    names = ("published", "delivered", "lost", "duplicates", "reordered")
    head = "<tr><th>App</th><th>Direction</th>" + "".join(f'<th class="n">{name.capitalize()}</th>' for name in names)
    rows = [
        f"<tr><td>{_text(way.app)}</td><td>{way.direction}</td>"
        + "".join(f'<td class="n">{getattr(way, name):,}</td>' for name in names)
        + "</tr>"
        for way in result.measured.ways
    ]
    return f"<table>{head}</tr>{''.join(rows)}</table>"
