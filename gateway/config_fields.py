"""What every TOML file of ours is read with: the document and its lines, and the checks of single values.

For the configuration and the scenarios. Knows no key of either.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from gateway.config_problems import ConfigErrors, Problem, syntax_problem
from gateway.config_values import parse_duration, parse_size, show_duration, show_size
from gateway.toml_lines import Path as KeyPath
from gateway.toml_lines import key_lines

FILE_MAX_BYTES = 4 << 20
CREDENTIAL = "credential:"
CREDENTIALS_DEFAULT = "/run/credentials/lineside.service"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read_document(path: Path, what: str) -> bytes:
    """The bytes of a file that somebody wrote. Raises ConfigErrors; `what` it is, with its article."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigErrors([Problem(str(path), 1, "", "", f"{what} that can be read ({error.strerror})", "")]) from None
    if len(data) > FILE_MAX_BYTES:
        expected = f"at most {show_size(FILE_MAX_BYTES)}"
        raise ConfigErrors([Problem(str(path), 1, "", "a larger file", expected, "")])
    return data


def toml_document(data: bytes | str, file: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """What the file says, and the line of each key. Raises ConfigErrors."""
    text = data if isinstance(data, str) else _decode(data, file)
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigErrors([syntax_problem(file, text, str(error))]) from None
    return raw, key_lines(text)


def _decode(data: bytes, file: str) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise ConfigErrors([Problem(file, line, "", found, "UTF-8 text", "")]) from None


def wrong(expected: str, write: str = "") -> PydanticCustomError:
    """An error that says what is expected and, where one can know, what to write instead."""
    return PydanticCustomError("lineside", "{expected}", {"expected": expected, "write": write})


def from_value_error(error: ValueError) -> PydanticCustomError:
    """The same from the ValueError(expected, what to write) of `config_values`."""
    expected = str(error.args[0])
    return wrong(expected, json.dumps(error.args[1]) if len(error.args) > 1 else "")


def size(lowest: int, highest: int = 1 << 46) -> BeforeValidator:
    """A size in bytes within bounds."""

    def check(value: object) -> int:
        try:
            size_bytes = parse_size(value)
        except ValueError as error:
            raise from_value_error(error) from None
        if not lowest <= size_bytes <= highest:
            raise wrong(f"a size from {show_size(lowest)} to {show_size(highest)}")
        return size_bytes

    return BeforeValidator(check)


def seconds(lowest: float, highest: float) -> BeforeValidator:
    """A duration in seconds within bounds."""

    def check(value: object) -> float:
        try:
            duration_s = parse_duration(value)
        except ValueError as error:
            raise from_value_error(error) from None
        if not lowest <= duration_s <= highest:
            raise wrong(f"a duration from {show_duration(lowest)} to {show_duration(highest)}")
        return duration_s

    return BeforeValidator(check)


def resolve_path(value: str, base: Path) -> Path:
    """Where a file is that the configuration names: relative to `base`, or a credential of the service's.

    `credential:NAME` is what `LoadCredential=NAME:...` of the unit provides (systemd.exec(5), CREDENTIALS). Without a
    service, as in `lineside check`, it is looked for where systemd keeps that of lineside.service.
    """
    if not value.startswith(CREDENTIAL):
        return base / value
    directory = os.environ.get("CREDENTIALS_DIRECTORY") or CREDENTIALS_DEFAULT
    return Path(directory) / value.removeprefix(CREDENTIAL)


def path_fault(value: str) -> str | None:
    """What is wrong with the text of a path, if anything."""
    if not value or "\0" in value:
        return "a path"
    if value.startswith(CREDENTIAL) and not _NAME.fullmatch(value.removeprefix(CREDENTIAL)):
        return "the name of a credential after credential:"
    return None


def check_name(value: object) -> object:
    """A name as gateways, hubs and streams have them."""
    if isinstance(value, str) and not _NAME.fullmatch(value):
        near = re.sub(r"[^A-Za-z0-9._-]+", "-", value).lstrip("._-")[:64]
        expected = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        raise wrong(expected, json.dumps(near) if near else "")
    return value
