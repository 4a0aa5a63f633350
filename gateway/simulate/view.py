"""How a simulation looks while it runs, and its verdict: a live panel in a terminal, a line a second elsewhere.

Draws on standard error where the result is JSON, so that programs get nothing but the result.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gateway.simulate.runner import Result, Sample
from gateway.simulate.scenario import Scenario
from gateway.simulate.verdict import Judgement

WIDTH = 72
BARS = " ▁▂▃▄▅▆▇█"
PLAIN_EVERY_S = 1.0


class View:
    """A context manager; `show` each sample."""

    def __init__(self, scenario: Scenario, scale: float, console: Console) -> None:
        self._scenario = scenario
        self._seconds = scenario.duration_s(scale)
        self._console = console
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task("starting", total=self._seconds)
        self._history: list[tuple[int, bool]] = []
        self._next_s = 0.0

    def __enter__(self) -> View:
        count = self._scenario.gateways.count
        self._console.print(
            f"[bold]{self._scenario.title}[/]: {count} gateway{'s' * (count > 1)}, about {self._seconds:.0f} s",
            highlight=False,
        )
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, s: Sample) -> None:
        if self._live is None:
            if s.at_s >= self._next_s:
                self._next_s = s.at_s + PLAIN_EVERY_S
                self._console.print(
                    f"{s.at_s:6.1f} s  {s.link:24} links {s.links_up:3}  backlog {s.backlog:7}  "
                    f"delivered {s.delivered}/{s.published}",
                    highlight=False,
                    soft_wrap=True,
                )
            return
        if s.at_s >= self._next_s:
            self._next_s = s.at_s + self._seconds * 1.1 / WIDTH
            self._history.append((s.backlog, s.links_up == self._scenario.gateways.count))
            del self._history[:-WIDTH]
        self._progress.update(self._task, completed=min(s.at_s, self._seconds), description=s.phase)
        self._live.update(self._panel(s))

    def _panel(self, s: Sample) -> Panel:
        top = max(max((backlog for backlog, _ in self._history), default=0), 1)
        spark = Text()
        for backlog, up in self._history:
            spark.append(BARS[min(8, (backlog * 8 + top - 1) // top)], "green" if up else "red")
        grid = Table.grid(padding=(0, 2))
        grid.add_row("line", Text(s.link, "bold green" if s.link.startswith("up") else "bold red"))
        grid.add_row("links up", f"{s.links_up} of {self._scenario.gateways.count}")
        grid.add_row("backlog", f"{s.backlog:,} messages, {s.in_flight:,} in flight")
        grid.add_row("delivered", f"{s.delivered:,} of {s.published:,}")
        late = "–" if s.latency_p99_s is None else f"{s.latency_p99_s:.3f} s"
        grid.add_row("on the way, p99", late)
        return Panel(
            Group(grid, Text(), Text("backlog over time", "dim"), spark, Text(), self._progress),
            title=f"{s.at_s:.1f} s",
            width=WIDTH + 6,
        )


def amount(value: float | None, unit: str) -> str:
    """A figure for people."""
    if value is None:
        return "not measured"
    if unit == "s":
        return f"{value:.3f} s"
    if unit == "bytes":
        return f"{value / (1 << 20):.1f} MiB"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def print_verdict(console: Console, result: Result) -> None:
    """The messages, the promises and the last word."""
    table = Table(title="Messages", title_justify="left")
    for name in ("app", "way", "published", "delivered", "lost", "duplicates", "reordered"):
        table.add_column(name, justify="left" if name in ("app", "way") else "right")
    for way in result.measured.ways:
        figures = (way.published, way.delivered, way.lost, way.duplicates, way.reordered)
        table.add_row(way.app, way.direction, *(f"{figure:,}" for figure in figures))
    console.print(table)
    table = Table(
        title=f"Verdict after {result.cuts} cut{'s' * (result.cuts != 1)}, by {result.proxy}", title_justify="left"
    )
    for name in ("promise", "what", "measured", "limit", ""):
        table.add_column(name, justify="right" if name in ("measured", "limit") else "left")
    for each in result.verdict:
        mark = Text("kept", "green") if each.kept else Text("BROKEN", "bold red")
        table.add_row(each.promise, each.what, amount(each.measured, each.unit), amount(each.limit, each.unit), mark)
    console.print(table)
    console.print(
        "[bold green]Every promise held.[/]" if result.kept else "[bold red]A promise broke.[/] See the row above."
    )


def as_json(result: Result) -> dict[str, Any]:
    """The result as one object, without the samples: those are the report's."""
    return {
        "scenario": result.name,
        "title": result.scenario.title,
        "kept": result.kept,
        "seconds": result.seconds,
        "scale": result.scale,
        "proxy": result.proxy,
        "gateways": result.scenario.gateways.count,
        "cuts": result.cuts,
        "apps": [
            {
                "app": way.app,
                "direction": way.direction,
                "qos": way.qos,
                "published": way.published,
                "acknowledged": way.acknowledged,
                "delivered": way.delivered,
                "lost": way.lost,
                "duplicates": way.duplicates,
                "reordered": way.reordered,
            }
            for way in result.measured.ways
        ],
        "ledger": result.measured.ledger,
        "verdict": [_judgement(each) for each in result.verdict],
    }


def _judgement(each: Judgement) -> dict[str, Any]:
    measured = round(each.measured, 4) if isinstance(each.measured, float) else each.measured
    return {
        "promise": each.promise,
        "what": each.what,
        "unit": each.unit,
        "measured": measured,
        "limit": each.limit,
        "kept": each.kept,
    }
