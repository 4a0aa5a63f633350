"""How the demo looks: a live panel in a terminal, a line a second where output is not a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gateway.faultlink import Line

if TYPE_CHECKING:
    from gateway.demo import Snapshot

WIDTH = 60
BARS = " ▁▂▃▄▅▆▇█"
PLAIN_EVERY_S = 1.0


class View:
    """A context manager; `show` each snapshot, then `verdict` after it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=8) if sys.stdout.isatty() else None
        self._history: list[int] = []
        self._lines: list[Line] = []
        self._next_s = 0.0

    def __enter__(self) -> View:
        self._console.print(
            "[bold]Lineside demo[/]: apps on a train publish over MQTT; the gateway journals\n"
            "what they say and forwards it to a hub over AMQP 1.0; the line goes through\n"
            f"three tunnels. About {self._seconds:g} s.\n"
        )
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, s: Snapshot) -> None:
        if self._live is None:
            if s.clock_s >= self._next_s:
                self._next_s = s.clock_s + PLAIN_EVERY_S
                self._console.print(
                    f"{s.clock_s:5.1f} s  line {s.line.value:7}  link {s.hub_state:10}  backlog {s.backlog:6}  "
                    f"out {len(s.outbound.seen)}/{s.outbound.published}  "
                    f"in {len(s.inbound.seen)}/{s.inbound.published}",
                    highlight=False,
                    soft_wrap=True,
                )
            return
        if s.clock_s >= self._next_s:
            self._next_s = s.clock_s + self._seconds * 1.15 / WIDTH
            self._history.append(s.backlog)
            self._lines.append(s.line)
        self._live.update(self._panel(s))

    def _panel(self, s: Snapshot) -> Panel:
        line = {
            Line.UP: Text("━━━━━━ open ━━━━━━", "bold green"),
            Line.TUNNEL: Text("▓▓▓▓ tunnel ▓▓▓▓", "bold red"),
            Line.CLOSED: Text("──╳── closed ──╳──", "bold yellow"),
        }[s.line]
        top = max(max(self._history, default=0), 1)
        spark = Text()
        for count, state in zip(self._history, self._lines, strict=True):
            bar = BARS[min(8, (count * 8 + top - 1) // top)]
            spark.append(bar, "green" if state is Line.UP else "red")
        grid = Table.grid(padding=(0, 2))
        grid.add_row("line", line, "hub link", Text(s.hub_state, "green" if s.hub_state == "up" else "yellow"))
        grid.add_row("backlog", f"{s.backlog:,} messages", "in flight", f"{s.in_flight:,}")
        grid.add_row("journaled", f"{s.rate_in:,.0f} /s", "forwarded", f"{s.rate_out:,.0f} /s")
        ways = Table(box=None, pad_edge=False)
        for name in ("direction", "published", "delivered", "on the way"):
            ways.add_column(name, justify="left" if name == "direction" else "right")
        for name, tally in (("train → hub", s.outbound), ("hub → train", s.inbound)):
            ways.add_row(name, f"{tally.published:,}", f"{len(tally.seen):,}", f"{tally.lost:,}")
        return Panel(
            Group(grid, Text(), Text("backlog over time", "dim"), spark, Text(), ways),
            title=f"{s.clock_s:4.1f} s · {s.phase}",
            width=WIDTH + 12,
        )

    def verdict(self, verdict: dict[str, Any], kept: bool) -> None:
        table = Table(title="Verdict", title_justify="left")
        for name in ("direction", "published", "delivered", "lost", "duplicates", "reordered"):
            table.add_column(name, justify="left" if name == "direction" else "right")
        for key, name in (("outbound", "train → hub"), ("inbound", "hub → train")):
            row = verdict[key]
            table.add_row(name, *(f"{row[k]:,}" for k in ("published", "delivered", "lost", "duplicates", "reordered")))
        self._console.print(table)
        self._console.print(
            f"{verdict['tunnels']} tunnels; traffic again at most {verdict['resume_s_max']:.2f} s after the line's "
            f"return;\nthe last tunnel's backlog delivered {verdict['drain_s']:.2f} s after it.",
            highlight=False,
            soft_wrap=True,
        )
        self._console.print(
            "[bold green]Every promise held.[/]" if kept else "[bold red]A promise broke.[/] See the row above."
        )
