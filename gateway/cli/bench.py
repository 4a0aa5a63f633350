"""`bench`: the measures of gateway/bench, with a table, JSON, a picture, and a verdict on the project's own targets."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli.output import json_option, print_json
from gateway.cli.tables import print_table

if TYPE_CHECKING:
    from gateway.bench.rows import Row
    from gateway.bench.targets import Judged

NAMES = (
    "intake", "amqp-intake", "latency", "rules", "sealed", "growth", "slow-disk", "drain", "both", "fanout", "resume",
    "start", "memory", "store", "written",
)  # fmt: skip


@click.command()
@click.argument("measures", nargs=-1, type=click.Choice(NAMES), metavar="[MEASURE]...")
@click.option("--quick", is_flag=True, help="One short round of each, small journals, fewer cases: a few minutes.")
@click.option("--rounds", type=click.IntRange(1, 50), help="In turns: ours, peer, ours, peer.  [default: 3; quick: 1]")
@click.option("--seconds", type=click.FloatRange(0.1, 60), help="That a round of intake lasts.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Measure what else is installed, too.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="On the file system to measure; needs 4 GB for the default run.",
)
@click.option(
    "--save",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write results as JSON and SVG there (in the source tree: tests/bench/results).",
)
@json_option
def bench(
    measures: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    peers: bool,
    directory: Path | None,
    save: Path | None,
    as_json: bool,
) -> None:
    """Measure Lineside on this machine, in turns with the peers that are installed on it, and judge the targets.

    MEASURE is one or more of: intake, amqp-intake, latency, rules, sealed, growth, slow-disk, drain, both, fanout,
    resume, start, memory, store, written. Without one, all of them: about fifteen minutes on two cores, --quick about
    three. Nothing is fetched; peers listen on loopback only. Missed targets do not change the exit status.
    """
    from dataclasses import replace

    from rich.console import Console

    from gateway.bench import machine
    from gateway.bench.measures import QUICK, Scale, run
    from gateway.bench.targets import judge

    scale = QUICK if quick else Scale()
    scale = replace(scale, peers=peers, rounds=rounds or scale.rounds, seconds=seconds or scale.seconds)
    console = Console(stderr=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lineside-bench-", dir=directory) as place:
        facts = machine.describe(Path(place))
        with console.status("starting") as status:
            for row in run(measures or NAMES, Path(place), scale, status.update):
                rows.append(row)
    judged = judge(rows)
    result: dict[str, Any] = {
        "machine": facts,
        "scale": asdict(scale),
        "rows": [asdict(row) | {"value": row.value} for row in rows],
        "targets": [asdict(each) for each in judged],
    }
    if as_json:
        print_json(result)
    else:
        click.echo(machine.line(facts))
        _print(rows, judged)
    if save is not None:
        for path in _save(save, result, rows, judged, machine.line(facts)):
            click.echo(f"written: {path}", err=True)


def _print(rows: list[Row], judged: list[Judged]) -> None:
    from gateway.bench.plot import plain, show

    def figure(value: float | None, text: str) -> str:
        return "-" if value is None else format(value, text)

    table = []
    for row in rows:
        value = "skipped" if row.value is None else show(row.value, row.unit)
        latencies = (figure(row.p50_ms, ".2f"), figure(row.p99_ms, ".2f"))
        costs = (figure(row.cpu_us, ".1f"), figure(row.ratio, ".2f"))
        meaning = row.durability or "-"
        if row.skipped:
            meaning = f"{meaning}; only {len(row.rounds)} rounds: {row.skipped}" if row.rounds else row.skipped
        table.append((row.measure, row.case, row.who, value, *latencies, *costs, meaning))
    columns = ("measure", "case", "who", ">median", ">p50 ms", ">p99 ms", ">CPU µs", ">ours ×", "acknowledged means")
    print_table(columns, table)
    click.echo()
    words = {True: "met", False: "MISSED", None: "not measured"}
    verdicts = [
        (
            each.what,
            each.wanted,
            "-" if each.measured is None else f"{plain(each.measured)} {each.unit}",
            words[each.met],
        )
        for each in judged
    ]
    print_table(("target", ">wanted", ">measured", ""), verdicts)


def _save(directory: Path, result: dict[str, Any], rows: list[Row], judged: list[Judged], title: str) -> list[Path]:
    from gateway.bench.plot import svg

    directory.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\D", "", str(result["machine"]["when"]))
    stem = f"{stem[:8]}-{stem[8:14]}-{(result['machine']['commit'] or 'installed').rstrip('+')}"
    data, picture = directory / f"{stem}.json", directory / f"{stem}.svg"
    data.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    picture.write_text(svg(rows, judged, title), encoding="utf-8")
    return [data, picture]
