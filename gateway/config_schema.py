"""Reads a configuration file: what each annotation of `config` asks for, and the whole by pydantic.

The daemon does not import this (`config_child`): pydantic and the schema are 14 MB that a finished `Config` has no use
for.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, TypeAdapter, ValidationError, ValidationInfo

from gateway import config
from gateway.config import Config
from gateway.config_checks import check_all
from gateway.config_fields import (
    check_name,
    from_value_error,
    path_fault,
    read_document,
    resolve_path,
    seconds,
    size,
    toml_document,
    wrong,
)
from gateway.config_problems import ConfigErrors
from gateway.config_report import Report
from gateway.config_values import (
    ACCEPT_LOSS,
    ALLOW_PLAINTEXT,
    LISTEN_DEFAULT,
    PLACEHOLDER,
    BrokerUrl,
    HubUrl,
    Listen,
    Shares,
    parse_broker_url,
    parse_hub_url,
    parse_listen,
    parse_origin,
    parse_rate,
    parse_shares,
    topic_filter_fault,
)
from security.rules import Action, Who, check_pattern, parse_who

# What the annotations of `config` name.
__all__ = [
    "AcceptLoss",
    "BeforeValidator",
    "Count",
    "Field",
    "FilePath",
    "Name",
    "Plaintext",
    "StreamBytes",
    "StrictBool",
    "StrictInt",
    "Timeout",
    "TopicFilter",
    "check_broker_url",
    "check_origin",
    "check_rate",
    "check_shares",
    "check_url",
    "check_who",
    "listed",
    "listen_at",
    "load",
    "loads",
    "pattern",
    "seconds",
    "size",
    "template",
]


def phrase(phrase: str, risk: str) -> BeforeValidator:
    """A setting that is only believed in its exact words."""

    def check(value: object) -> bool:
        if value != phrase:
            raise wrong(f"exactly these words, because {risk}", json.dumps(phrase))
        return True

    return BeforeValidator(check)


def _check_file(value: object, info: ValidationInfo) -> object:
    """Paths are relative to the configuration file's own directory."""
    if not isinstance(value, str):
        return value
    if fault := path_fault(value):
        raise wrong(fault)
    return resolve_path(value, Path((info.context or {}).get("base", Path())))


def _check_topic_filter(value: object) -> object:
    if isinstance(value, str) and (fault := topic_filter_fault(value)):
        raise wrong(*fault)
    return value


def template(*known: str, topic: bool = False) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, str):
            return value
        allowed = ", ".join(f"{{{name}}}" for name in known)
        if not value or len(value) > 1024 or not value.isprintable():
            raise wrong("1 to 1024 printable characters")
        for name in PLACEHOLDER.findall(value):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.0)[0]
                raise wrong(f"only the placeholders {allowed}", json.dumps(value.replace(name, near, 1)))
        bare = PLACEHOLDER.sub("", value)
        if "{" in bare or "}" in bare:
            raise wrong(f"braces only around a placeholder ({allowed})")
        if topic and ("#" in bare or "+" in bare):
            raise wrong("a topic to publish to, which has no '#' and no '+'")
        return value

    return BeforeValidator(check)


def listen_at(protocol: str) -> BeforeValidator:
    def check(value: object) -> Listen:
        if not isinstance(value, str):
            raise wrong('"host:port" or "unix:/path"', json.dumps(LISTEN_DEFAULT[protocol]))
        try:
            return parse_listen(value, protocol)
        except ValueError as error:
            raise from_value_error(error) from None

    return BeforeValidator(check)


def check_origin(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_origin(value)
    except ValueError as error:
        raise from_value_error(error) from None


def check_url(value: object) -> HubUrl:
    if not isinstance(value, str):
        raise wrong("a URL", '"amqps://hub.example:5671"')
    try:
        return parse_hub_url(value)
    except ValueError as error:
        raise from_value_error(error) from None


def check_rate(value: object) -> float:
    try:
        return parse_rate(value)
    except ValueError as error:
        raise from_value_error(error) from None


def check_shares(value: object) -> Shares:
    try:
        return parse_shares(value)
    except ValueError as error:
        raise wrong(*error.args) from None


def check_broker_url(value: object) -> BrokerUrl:
    if not isinstance(value, str):
        raise wrong("a URL", '"mqtt://127.0.0.1:1883"')
    try:
        return parse_broker_url(value)
    except ValueError as error:
        raise from_value_error(error) from None


def check_who(value: object) -> Who:
    try:
        return parse_who(value)
    except ValueError as error:
        raise from_value_error(error) from None


def pattern(action: Action) -> BeforeValidator:
    def check(value: object) -> object:
        try:
            check_pattern(value, action)
        except ValueError as error:
            raise from_value_error(error) from None
        return value

    return BeforeValidator(check)


def listed(value: object) -> object:
    """One word needs no brackets."""
    return [value] if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(check_name)]
FilePath = Annotated[Path, BeforeValidator(_check_file)]
TopicFilter = Annotated[str, BeforeValidator(_check_topic_filter)]
Timeout = Annotated[float, seconds(0.01, 600)]
StreamBytes = Annotated[int, size(1 << 16)]
Count = Annotated[StrictInt, Field(ge=1, le=1_000_000_000)]
Plaintext = Annotated[bool, phrase(ALLOW_PLAINTEXT, "whoever shares the network can then read and write it")]
AcceptLoss = Annotated[bool, phrase(ACCEPT_LOSS, "a power cut then takes messages that were acknowledged")]


def _resolve(table: type) -> None:
    """Turn the annotations of a table, which are text, into the types that pydantic reads off its fields."""
    hints = typing.get_type_hints(table, localns=globals(), include_extras=True)
    for field in dataclasses.fields(table):
        field.type = hints[field.name]


for _table in vars(config).values():
    if isinstance(_table, type) and hasattr(_table, "__pydantic_config__"):
        _resolve(_table)
_CONFIG = TypeAdapter(Config)


def load(path: Path, *, check_files: bool = True) -> Config:
    """Read and check the file. Raises ConfigErrors with every problem in it.

    `check_files=False` leaves out whether certificates, keys and passwords can be read: for commands that need
    none of them and may run as somebody who may not read them.
    """
    data = read_document(path, "a configuration file")
    return loads(data, file=str(path), base=path.parent, check_files=check_files)


def loads(data: bytes | str, *, file: str = "config", base: Path = Path(), check_files: bool = True) -> Config:
    """As `load`, from the content itself; paths in it are relative to `base`."""
    raw, lines = toml_document(data, file)
    report = Report(Config, file, raw, lines)
    context = {"base": base.absolute()}
    config: Config | None = None
    try:
        config = _CONFIG.validate_python(raw, context=context)
    except ValidationError as errors:
        for each in errors.errors(include_url=False):
            report.add_from_pydantic(each["type"], each["loc"], each.get("ctx") or {}, each["msg"])
    check_all(raw, context["base"], report, check_files=check_files)
    if report.problems or config is None:
        raise ConfigErrors(report.problems)
    for number, rule in enumerate(config.access):
        object.__setattr__(rule, "line", lines.get(("access", number), 0))
    return config
