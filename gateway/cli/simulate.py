"""`simulate` and `verify`: bad days on purpose, and whether the promises held."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.cli.output import json_option, print_json
from gateway.cli.tables import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from gateway.simulate.disk import Disk
    from gateway.simulate.runner import Sample
    from gateway.simulate.verify import Blow, Tried

T = TypeVar("T")


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, and SIGTERM ends it as Ctrl-C does: by KeyboardInterrupt, with every daemon stopped before."""

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await coroutine

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


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
            result = _run(simulation.run())
        else:
            with View(checked, scale, console) as view:
                simulation = Simulation(
                    checked, path.stem, Path(directory), view.show, scale=scale, toxiproxy=toxiproxy
                )
                result = _run(simulation.run())
    if report is not None:
        report.write_text(render(result), encoding="utf-8")
    if as_json:
        print_json(result_json(result))
    else:
        print_verdict(console, result)
    sys.exit(0 if result.kept else 1)


def _unseen(_: Sample) -> None:
    """Programs get the result alone."""


@click.command()
@click.option("--cycles", type=click.IntRange(1, 1_000_000), default=25, show_default=True, help="How many blows.")
@click.option(
    "--power-cuts",
    type=click.IntRange(0, 1_000_000),
    default=5,
    show_default=True,
    help="How many power cuts after them, on a file system that forgets what was not synced (needs FUSE).",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("lineside-verify"),
    show_default=True,
    help="On the disk to try; made if missing, and refused if anything is in it.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted, by a real power cut perhaps.")
@json_option
def verify(cycles: int, power_cuts: int, directory: Path, resume: bool, as_json: bool) -> None:
    """Try the promises on this machine's own disk: time its syncs, then kill daemons and cut the line while messages
    are on their way, and hold what was acknowledged against what arrived. Then cut the power under a file system that
    forgets, where FUSE is there.

    Exits with 1 where a promise broke; the directory is then left as it is. Interrupted, it goes on with --resume.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gateway.simulate.verify import Verify

    console = Console(stderr=as_json)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    task = progress.add_task("starting", total=cycles + power_cuts)

    def show(tried: Tried, blow: Blow | None) -> None:
        progress.update(task, completed=tried.cycles, description="settling" if blow is None else blow.value)

    run = Verify(directory, cycles, resume, show, power_cuts)
    try:
        with progress:
            found = _run(run.run())
    except KeyboardInterrupt:
        raise click.ClickException(
            f"interrupted after {run.tried.cycles} cycles; go on with `lineside verify --resume --directory "
            f"{directory} --cycles {cycles} --power-cuts {power_cuts}`"
        ) from None
    kept = run.tried.kept
    if kept:
        run.remove()
    if as_json:
        print_json(_verify_json(run.tried, found))
    else:
        _print_verify(console, run.tried, found, directory)
    sys.exit(0 if kept else 1)


def _promises(tried: Tried) -> list[tuple[str, str, int, int]]:
    """Promise, what was counted, how many, how many are allowed."""
    from gateway.simulate.verify import DUPLICATES_MAX

    return [
        ("P1", "not acknowledged", tried.unacknowledged, 0),
        ("P1", "acknowledged and lost", tried.lost, 0),
        ("P2", "out of order", tried.reordered, 0),
        ("P3", "duplicates, most in one cycle", tried.duplicates_max, DUPLICATES_MAX),
        ("P4", "lost and not in the ledger", tried.unaccounted, 0),
    ]


def _verify_json(tried: Tried, found: Disk) -> dict[str, object]:
    from dataclasses import asdict

    promises = [
        {"promise": promise, "what": what, "measured": measured, "limit": limit, "kept": measured <= limit}
        for promise, what, measured, limit in _promises(tried)
    ]
    return {"kept": tried.kept, "disk": asdict(found), "promises": promises, **asdict(tried)}


def _print_verify(console: Console, tried: Tried, found: Disk, directory: Path) -> None:
    mount, syncs = found.mount, found.syncs
    kind = {True: "rotating", False: "not rotating", None: "unknown"}[mount.rotating]
    pragmas = ", ".join(f"{name} = {value}" for name, value in found.pragmas.items())
    rows = [
        ("mount", f"{mount.point} ({mount.fs} on {mount.source}; {','.join(mount.options)})"),
        ("device", f"{mount.device or 'none'}, {kind}, write cache {mount.write_cache or 'unknown'}"),
        ("sync of 16 KiB", f"median {syncs.median_s * 1e3:.2f} ms, p99 {syncs.p99_s * 1e3:.2f} ms ({syncs.count})"),
        ("journal", f"{pragmas}; synchronous = FULL, as configured"),
    ]
    print_table(("disk", "found"), rows)
    for doubt in found.doubts:
        console.print(f"[bold red]doubt[/]: {doubt}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if not found.doubts:
        console.print("Nothing speaks against believing its syncs; only a power cut can prove them.", highlight=False)
    blows = ", ".join(f"{count} × {name}" for name, count in tried.blows.items())
    console.print(
        f"\n{tried.cycles} cycles ({blows}); {tried.acknowledged:,} acknowledged, {tried.delivered:,} delivered, "
        f"{tried.duplicates:,} of them twice",
        highlight=False,
        soft_wrap=True,
    )
    if tried.no_power_cuts is not None:
        console.print(f"No power cuts were tried: {tried.no_power_cuts}", highlight=False, soft_wrap=True)
    print_table(
        ("promise", "what", ">counted", ">allowed", ""),
        [(*row, "kept" if row[2] <= row[3] else "BROKEN") for row in _promises(tried)],
    )
    if not tried.kept:
        console.print(f"[bold red]A promise broke.[/] Journals and record are in {directory}.", soft_wrap=True)
