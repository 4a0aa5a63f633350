"""`simulate` and `verify`: bad days on purpose, and whether the promises held."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli.output import json_option, print_json, print_table

if TYPE_CHECKING:
    from gateway.simulate.runner import Sample


@click.command()
@click.argument("scenario", required=False)
@click.option("--list", "listing", is_flag=True, help="The scenarios that come with Lineside.")
@click.option(
    "--scale",
    type=click.FloatRange(0.001, 10),
    default=1.0,
    show_default=True,
    help="Multiply every duration of the timetable; rates, latency and limits stay as they are.",
)
@click.option(
    "--toxiproxy",
    metavar="URL",
    help="A Toxiproxy that runs on this machine; otherwise one is started, or a small one of our own.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write a page with backlog, rate, latency and link state over time.",
)
@click.option("--check", "only_check", is_flag=True, help="Only say whether the file is right.")
@json_option
def simulate(
    scenario: str | None,
    listing: bool,
    scale: float,
    toxiproxy: str | None,
    report: Path | None,
    only_check: bool,
    as_json: bool,
) -> None:
    """Run SCENARIO, a TOML file or the name of one that comes with Lineside, and judge every promise.

    Starts gateways, hub and apps on this machine, takes the line between them through the scenario's timetable, and
    exits with 1 where a promise broke.
    """
    from gateway.simulate.scenario import find, load, shipped

    if listing:
        loaded = {name: load(path) for name, path in shipped().items()}
        if as_json:
            print_json([{"scenario": n, "title": s.title, "seconds": s.duration_s()} for n, s in loaded.items()])
        else:
            rows = [(name, f"{s.duration_s():.0f} s", str(s.gateways.count), s.title) for name, s in loaded.items()]
            print_table(("scenario", ">takes", ">gateways", "title"), rows)
        return
    if scenario is None:
        raise click.UsageError("Name a SCENARIO; `lineside simulate --list` shows those that come with Lineside.")
    path = find(scenario)
    checked = load(path)
    if only_check:
        click.echo(f"{path}: no problem found; {checked.duration_s(scale):.0f} s")
        return
    if report is not None and not report.absolute().parent.is_dir():
        raise click.BadParameter(f"{report.absolute().parent} is no directory", param_hint="--report")

    from rich.console import Console

    from gateway.simulate.report import render
    from gateway.simulate.runner import Simulation
    from gateway.simulate.view import View, print_verdict
    from gateway.simulate.view import as_json as result_json

    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory(prefix="lineside-simulate-") as directory:
        if as_json:
            simulation = Simulation(checked, path.stem, Path(directory), _unseen, scale=scale, toxiproxy=toxiproxy)
            result = asyncio.run(simulation.run())
        else:
            with View(checked, scale, console) as view:
                simulation = Simulation(
                    checked, path.stem, Path(directory), view.show, scale=scale, toxiproxy=toxiproxy
                )
                result = asyncio.run(simulation.run())
    if report is not None:
        report.write_text(render(result), encoding="utf-8")
    if as_json:
        print_json(result_json(result))
    else:
        print_verdict(console, result)
    sys.exit(0 if result.kept else 1)


def _unseen(_: Sample) -> None:
    """Programs get the result alone."""
