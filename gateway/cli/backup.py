"""`backup` and `restore`: the journal as one verified file, put back here or on another machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli.output import json_option, print_json, resolve_state_dir, safe, show_bytes, show_time, state_options

if TYPE_CHECKING:
    from storeforward.backup import Contents, Progress


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--move", is_flag=True, help="Hand the journal over: the gateway here, stopped, will not start on it again."
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists, once the new one is complete.")
@state_options
@json_option
def backup(file: Path, move: bool, overwrite: bool, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """Copy the journal to FILE, also while the gateway runs, and verify the copy.

    FILE holds the messages, cursors, sessions, retained messages, dead letters and the ledger. The configuration,
    certificates and password files are not in it.
    """
    from storeforward.backup import back_up, hand_over

    where = resolve_state_dir(config, state_dir)
    with _progress("copying", shown=not as_json) as progress:
        contents = (hand_over if move else back_up)(where, file, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"file": str(file), "moved": move, **asdict(contents)})
        return
    click.echo(f"{safe(str(file))}: {_describe(contents)}; verified")
    if move:
        click.echo(
            f"{safe(str(where))} is handed over: no gateway starts on it. On the new machine: lineside restore "
            f"{safe(file.name)}"
        )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--check", "only_check", is_flag=True, help="Only verify FILE and say what it holds.")
@click.option("--replace", is_flag=True, help="Set a journal that is there aside, under quarantine/, and take FILE.")
@state_options
@json_option
def restore(file: Path, only_check: bool, replace: bool, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """Make FILE, which `lineside backup` wrote, the journal of the gateway here, which must be stopped.

    What was sent after the backup was taken is sent again, under the identity it had; what arrived after it is not in
    it. A backup made with --move is complete.
    """
    from storeforward.backup import restore as put_back
    from storeforward.backup import verify

    if only_check:
        contents = verify(file)
    else:
        where = resolve_state_dir(config, state_dir)
        with _progress("restoring", shown=not as_json) as progress:
            contents = put_back(file, where, replace=replace, progress=progress)
    if as_json:
        print_json({"file": str(file), "restored": not only_check, **asdict(contents)})
        return
    click.echo(f"{safe(str(file))}: {_describe(contents)}; verified")
    if not only_check:
        click.echo(f"restored into {safe(str(where))}; start the gateway when the old one cannot run any more")


def _describe(contents: Contents) -> str:
    taken = f"taken {show_time(contents.taken_us)}, " if contents.taken_us else ""
    return (
        f"{taken}{contents.messages} messages ({show_bytes(contents.size_bytes)}) in {contents.streams} streams, "
        f"{contents.sessions} sessions, {contents.retained} retained, {contents.dead} dead letters"
    )


@contextmanager
def _progress(label: str, *, shown: bool) -> Iterator[Progress | None]:
    """A bar on a terminal's standard error; nothing elsewhere."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1000, label=label, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.update(done * 1000 // total - bar.pos)

        yield report
