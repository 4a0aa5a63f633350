"""How commands print, and the options they share: values for people, JSON for programs, nothing shortened.

Knows nothing of what is printed. Text from messages never reaches a terminal as it is: control characters are shown
as escapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.errors import ConfigError

if TYPE_CHECKING:
    from security.atrest import Keyring

CONFIG_DEFAULT = Path("/etc/lineside/lineside.toml")

F = TypeVar("F", bound=Callable[..., Any])


def config_option(command: F) -> F:
    """`--config F`"""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        envvar="LINESIDE_CONFIG",
        default=CONFIG_DEFAULT,
        show_default=True,
        show_envvar=True,
        help="The configuration file.",
    )(command)


def state_options(command: F) -> F:
    """`--config F` and `--state-dir D`: where the journal is."""
    command = click.option(
        "--state-dir",
        type=click.Path(path_type=Path),
        help="The directory of the journal, instead of the one the configuration names.",
    )(command)
    return config_option(command)


def json_option(command: F) -> F:
    """`--json`"""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def resolve_state_dir(config: Path, state_dir: Path | None) -> Path:
    """The journal's directory. Reads one key of the configuration and checks nothing else of it.

    So that whoever looks into a journal needs neither the certificates that the configuration names nor the right to
    read them. Raises ConfigError.
    """
    if state_dir is not None:
        return state_dir
    import tomllib

    try:
        with config.open("rb") as file:
            gateway = tomllib.load(file).get("gateway", {})
    except OSError as error:
        raise ConfigError(
            f"{config}: {error.strerror}; name a configuration with --config, or the journal's directory with "
            "--state-dir"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{config}: {error}") from None
    found = gateway.get("state_dir", "/var/lib/lineside") if isinstance(gateway, dict) else None
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{config}: gateway.state_dir is not a path; `lineside check` says more")
    return config.absolute().parent / found


def resolve_keys(config: Path) -> Keyring | None:
    """What opens an encrypted journal, if the configuration names keys that this user may read; else None."""
    import tomllib

    try:
        with config.open("rb") as file:
            gateway = tomllib.load(file).get("gateway", {})
    except (OSError, ValueError):
        return None
    names = gateway.get("encryption_keys", []) if isinstance(gateway, dict) else []
    if not names or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    from gateway.config_fields import resolve_path
    from security.atrest import KeyFileError, Keyring, read_key

    try:
        return Keyring([read_key(resolve_path(name, config.absolute().parent)) for name in names])
    except KeyFileError as error:
        click.echo(f"lineside: {safe(str(error))}: what is encrypted stays so", err=True)
        return None


def print_json(value: Any) -> None:
    """One JSON document on one line of standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def safe(text: str) -> str:
    """Text that cannot move a terminal's cursor or forge a line: what is not printable becomes an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii") if not "\ud800" <= char <= "\udfff" else "\ufffd"


def show_body(body: bytes) -> str:
    """A payload for people: text if it is UTF-8, else its hexadecimal digits."""
    try:
        return safe(body.decode())
    except UnicodeDecodeError:
        return f"0x{body.hex()}"


def json_body(body: bytes) -> dict[str, str]:
    """A payload for programs: `text` if it is UTF-8, else `base64`."""
    try:
        return {"text": body.decode()}
    except UnicodeDecodeError:
        import base64

        return {"base64": base64.b64encode(body).decode("ascii")}


def show_time(time_us: int | None) -> str:
    """A wall clock time, UTC, to the millisecond."""
    if time_us is None:
        return "-"
    try:
        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)
    except OverflowError:
        return f"{time_us} µs"
    return when.isoformat(" ", "milliseconds").replace("+00:00", "Z")


def show_bytes(size_bytes: int | float | None) -> str:
    """A size for people."""
    if size_bytes is None:
        return "-"
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_seconds(duration_s: float | None) -> str:
    """A duration for people."""
    if duration_s is None:
        return "-"
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)
