"""`rekey`: bring everything in the journal under the first of its keys, or in plain text again."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gateway.cli.inspect import become_owner
from gateway.cli.output import json_option, print_json, resolve_keys, resolve_state_dir, state_options
from gateway.errors import LinesideError


@click.command()
@click.option("--decrypt", is_flag=True, help="Leave nothing encrypted; then take encryption_keys out of [gateway].")
@state_options
@json_option
def rekey(decrypt: bool, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """Rewrite the journal of a stopped gateway under the first of its encryption_keys.

    For a key that is to go: put the new one before it, start the gateway or not, stop it, `lineside rekey`, take the
    old one out. For what was stored before there was a key. Can be cut off anywhere, and called again.
    """
    where = resolve_state_dir(config, state_dir)
    seal = resolve_keys(config)
    if seal is None:
        raise LinesideError(f"{config}: encryption_keys of [gateway] names no key that can be read")
    from storeforward.inspection import Inspection
    from storeforward.rekey import rekey as rewrite

    with Inspection(where):
        pass  # so that a mistyped directory is complained about, and not filled with an empty journal
    become_owner(where)
    done, damaged = rewrite(where, seal, decrypt=decrypt)
    if as_json:
        print_json({"rewritten": done, "damaged": damaged, "key": None if decrypt else seal.ids[0]})
    else:
        click.echo(f"rewrote {done} rows " + ("in plain text" if decrypt else f"under key {seal.ids[0]}"))
    if damaged:
        click.echo(f"lineside: {damaged} damaged rows stay as they were, and so does the need for their keys", err=True)
        sys.exit(1)
