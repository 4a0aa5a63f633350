"""`passwd`: the file of users and passwords that `password_file` in [mqtt] and [amqp] names.

A password is typed, or read from standard input; never an argument, which every user of the machine can see.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from gateway.cli.output import json_option, print_json, safe
from gateway.errors import LinesideError


class PasswdError(LinesideError):
    """The password file can't be read or written, or there is no such user in it."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("user", required=False)
@click.argument("dash", required=False, metavar="[-]")
@click.option("--delete", is_flag=True, help="Remove the user.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input; the same as - at the end.")
@click.option("--list", "listed", is_flag=True, help="List the users.")
@json_option
def passwd(
    file: Path, user: str | None, dash: str | None, delete: bool, password_stdin: bool, listed: bool, as_json: bool
) -> None:
    """Set the password of USER in FILE (made if it is not there, mode 0600), remove the user, or list all.

    A running gateway takes the change at the next login; who is connected stays so.
    """
    from security import passwords
    from security.passwords import PasswordFileError

    if dash not in (None, "-"):
        raise click.UsageError("A password is not given as an argument: others could see it. Use - to read it.")
    password_stdin = password_stdin or dash == "-"
    if listed + delete + password_stdin > 1 or (listed and user is not None):
        raise click.UsageError("Use one of FILE --list, FILE USER, FILE USER - and FILE USER --delete.")
    try:
        if listed:
            _print_users(sorted(passwords.read(file).entries), as_json)
            return
        if user is None:
            raise click.UsageError("Name a USER, or use --list.")
        try:
            passwords.check_user(user)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="USER") from None
        if delete:
            if not file.exists() or not passwords.update(file, user, None):
                raise PasswdError(f"{file} has no user {user}; --list tells which there are")
            done = "removed"
        else:
            password = _ask(user, password_stdin)
            try:
                entry = passwords.hash_password(password)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            new = not file.exists()
            done = "changed" if passwords.update(file, user, entry) else "added"
            if new and os.geteuid() == 0:  # later changes keep owner, group and the group's right to read
                click.echo(
                    safe(f"note: only root can read {file}; for a gateway that runs as lineside: ")
                    + safe(f"chgrp lineside {file} && chmod 640 {file}"),
                    err=True,
                )
    except PasswordFileError as error:
        raise PasswdError(str(error)) from None
    if as_json:
        print_json({"file": str(file), "user": user, "done": done})
    else:
        click.echo(safe(f"{file}: {user} {done}"))


def _print_users(users: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"users": users})
    for user in [] if as_json else users:
        click.echo(safe(user))


def _ask(user: str, from_stdin: bool) -> bytes:
    if from_stdin:
        from security.passwords import PASSWORD_BYTES_MAX

        data = sys.stdin.buffer.read(PASSWORD_BYTES_MAX + 3)
        return data.removesuffix(b"\n").removesuffix(b"\r")
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on: use --password-stdin.")
    typed: str = click.prompt(f"New password of {safe(user)}", hide_input=True, confirmation_prompt="Once more")
    return typed.encode()
