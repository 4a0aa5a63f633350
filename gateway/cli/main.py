"""The command `lineside`: finds the command a person typed, and says what went wrong in one line.

Exit status: 0 done, 1 a promise or an operation failed, 2 usage or configuration. Each command is imported when it
is typed, so that the rest cost nothing.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from gateway.errors import ConfigError, LinesideError

# Name, where it is, and what `lineside --help` says of it. The order is that of the help.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("gateway.cli.check:run", "Run the gateway."),
    "check": ("gateway.cli.check:check", "Explain the configuration, or say what is wrong with it."),
    "demo": ("gateway.cli.check:demo", "Hub, gateway, tunnel and apps in one command."),
    "simulate": ("gateway.cli.simulate:simulate", "Tunnels and other bad days as files, with a verdict."),
    "verify": ("gateway.cli.simulate:verify", "Kills and cuts on this machine's own disk, with a verdict."),
    "bench": ("gateway.cli.bench:bench", "How fast it is on this machine, beside the peers that are installed."),
    "status": ("gateway.cli.inspect:status", "What the gateway is doing."),
    "backlog": ("gateway.cli.inspect:backlog", "What waits in each stream, or in one of them."),
    "show": ("gateway.cli.inspect:show", "One message of a stream."),
    "export": ("gateway.cli.inspect:export", "Every message of a stream, as JSON lines."),
    "deadletter": ("gateway.cli.inspect:deadletter", "Messages the hub would not take."),
    "losses": ("gateway.cli.inspect:losses", "Every message that was dropped, and why."),
    "clients": ("gateway.cli.inspect:clients", "Who is connected."),
    "backup": ("gateway.cli.backup:backup", "The journal as one verified file, also while the gateway runs."),
    "restore": ("gateway.cli.backup:restore", "Put a backup back, here or on another machine."),
    "rekey": ("gateway.cli.rekey:rekey", "Bring an encrypted journal under its first key, or out of it."),
    "publish": ("gateway.cli.client:publish", "Send messages over MQTT."),
    "subscribe": ("gateway.cli.client:subscribe", "Receive messages over MQTT."),
    "passwd": ("gateway.cli.passwd:passwd", "Set, remove or list the passwords of local apps."),
    "pki": ("gateway.cli.pki:pki", "A private certificate authority for a fleet."),
}


# What standard output may say to it all: a full disk behind it, a reader that has gone.
_NOT_WRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Commands(click.Group):
    """A group that imports a command when it is asked for, and turns our errors into one line and a status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            _complain(error)
            ctx.exit(2)
        except OSError as error:
            # A file that is not ours to read or write, in a command that did not expect it. The daemon expects its own.
            if error.filename is None or ctx.invoked_subcommand == "run":
                raise
            _complain(LinesideError(f"{os.fsdecode(error.filename)}: {error.strerror}"))
            ctx.exit(1)
        except Exception as error:
            if not _is_ours(error):
                raise
            _complain(error)
            ctx.exit(1)


def _is_ours(error: Exception) -> bool:
    """Whether the error is made to be read by a person. The journal's own module may well not be loaded."""
    if isinstance(error, LinesideError):
        return True
    journal = sys.modules.get("storeforward.errors")
    return journal is not None and isinstance(error, (journal.JournalError, journal.JournalFull))


def _complain(error: Exception) -> None:
    from gateway.cli.output import safe

    for line in str(error).splitlines() or [type(error).__name__]:
        click.echo(f"lineside: {safe(line)}", err=True)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from gateway import __version__

        click.echo(f"lineside {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version.",
)
def cli() -> None:
    """Store-and-forward gateway for machines that lose the line: MQTT and AMQP 1.0 in, a synced journal, AMQP
    1.0 over TLS out.

    backlog, show, export, deadletter and losses read the journal itself: they answer with the daemon stopped, too.
    """


def _have_standard_streams() -> None:
    """Where who called us has closed one, it leads nowhere: else the next file opened took its number, and what is
    printed there went into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> None:
    """Entry point of the command `lineside`."""
    _have_standard_streams()
    try:
        try:
            cli(prog_name="lineside")
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        # Python would try once more at its end, and say so in its own way.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if error.errno != errno.EPIPE:
            _complain(LinesideError(f"the output can't be written: {error.strerror}"))
        sys.exit(1)
