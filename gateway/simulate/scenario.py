"""Scenario files: what they may say, and what they say.

A scenario is TOML: gateways, apps, a hub, the line's timetable step by step, and the limits of the verdict. `load`
returns a frozen `Scenario` or raises one ConfigErrors with everything that is wrong, each with its line. Knows no
socket and no clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from gateway import config as gateway_config
from gateway.config_fields import from_value_error, read_document, seconds, size, toml_document, wrong
from gateway.config_problems import ConfigErrors
from gateway.config_report import Report
from gateway.config_schema import Name, TopicFilter
from gateway.config_values import HubUrl, parse_hub_url, show_duration
from gateway.errors import ConfigError

GATEWAYS_MAX = 100
STEPS_MAX = 1000
REPEAT_MAX = 10_000
MESSAGES_MAX = 5_000_000
SCALE_MIN, SCALE_MAX = 0.001, 10.0
_BANDWIDTH = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(kbit/s|Mbit/s|Gbit/s)")
_BITS = {"kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9}

Link = Literal[
    "up",
    "tunnel",
    "tunnel-fin",
    "reset",
    "half-open",
    "flapping",
    "stall",
    "acks-lost",
    "hub-restart",
    "hub-slow",
]
# Steps after which the line has to come back by itself: what `resume` and `drain` are measured from, and `cuts` counts.
CUTS = frozenset({"tunnel", "tunnel-fin", "reset", "half-open", "flapping", "acks-lost", "hub-restart"})

Direction = Literal["up", "down"]
Rate = StrictFloat | StrictInt


def _bits(value: object) -> float:
    match = _BANDWIDTH.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise wrong('a bandwidth such as "9.6kbit/s" or "54Mbit/s"')
    bits_per_s = float(match[1]) * _BITS[match[2]]
    if not 8000 <= bits_per_s <= 1e10:
        raise wrong("a bandwidth from 8 kbit/s to 10 Gbit/s, as the proxy counts whole kilobytes a second")
    return bits_per_s


def _url(value: object) -> HubUrl:
    if not isinstance(value, str):
        raise wrong("a URL", '"amqp://127.0.0.1:5672"')
    try:
        url = parse_hub_url(value)
    except ValueError as error:
        raise from_value_error(error) from None
    if not url.tls and not url.loopback:
        raise wrong("a hub on this machine, or one reached with TLS (amqps://)")
    return url


def _topic(value: object) -> object:
    if isinstance(value, str) and ("+" in value or "#" in value):
        raise wrong("a topic to publish to, which has no '#' and no '+'")
    return value


def _some(what: str, write: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value == () or value == []:
            raise wrong(what, write)
        return value

    return BeforeValidator(check)


def _file(value: object) -> object:
    return str(Path(value).expanduser().absolute()) if isinstance(value, str) and value else value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


class Gateways(_Table):
    """`[gateways]`: how many, what they are called, and what their configuration says beside the usual."""

    count: Annotated[StrictInt, Field(ge=1, le=GATEWAYS_MAX)] = 1
    id: Name = "loco"
    # Whether the machine notices that the line is back, as one with a radio does; behind a router it does not.
    signal: StrictBool = True
    config: dict[str, dict[str, Any]] = Field(default={}, examples=[{}])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.id}-{number}" for number in range(1, self.count + 1))


class Hub(_Table):
    """`[hub]`: nothing for a Lineside of our own, or the URL of one that runs."""

    url: Annotated[HubUrl, BeforeValidator(_url)] | None = Field(default=None, examples=["amqp://127.0.0.1:5672"])
    kind: Literal["generic", "artemis", "rabbitmq", "lineside", "dispatch"] = "lineside"
    user: str | None = Field(default=None, min_length=1, max_length=255, examples=["loco"])
    password_file: Annotated[str | None, BeforeValidator(_file)] = Field(default=None, examples=["depot.password"])
    ca: Annotated[str | None, BeforeValidator(_file)] = Field(default=None, examples=["ca.pem"])
    cert: Annotated[str | None, BeforeValidator(_file)] = Field(default=None, examples=["gateway.pem"])
    key: Annotated[str | None, BeforeValidator(_file)] = Field(default=None, examples=["gateway.key"])


class AppTable(_Table):
    """`[[app]]`: one producer at every gateway ("up"), or at the centre for every gateway ("down")."""

    name: Name = Field(description="what the app is called", examples=["telemetry"])
    direction: Direction = "up"
    rate: Annotated[Rate, Field(gt=0, le=50_000)] = Field(description="messages a second", examples=[10])
    size_bytes: Annotated[int, size(32, 1 << 20)] = Field(default=200, alias="size", examples=["200B"])
    qos: Annotated[StrictInt, Field(ge=0, le=2)] = 1
    stream: Name | None = Field(default=None, examples=["telemetry"])
    topic: Annotated[TopicFilter, BeforeValidator(_topic)] | None = Field(default=None, examples=["train/speed"])
    class_: Literal["urgent", "normal", "bulk"] = Field(default="normal", alias="class")

    @property
    def stream_name(self) -> str:
        return self.stream or self.name

    @property
    def topic_name(self) -> str:
        return self.topic or f"{'commands' if self.direction == 'down' else 'train'}/{self.name}"


class Step(_Table):
    """`[[step]]`: how the line is, and for how long."""

    link: Link = Field(description="how the line is", examples=["tunnel"])
    for_s: Annotated[float, seconds(0.05, 86400)] = Field(alias="for", description="how long", examples=["30s"])
    latency_s: Annotated[float, seconds(0, 30)] = Field(default=0.0, alias="latency", examples=["300ms"])
    jitter_s: Annotated[float, seconds(0, 30)] = Field(default=0.0, alias="jitter", examples=["50ms"])
    bandwidth_bit_s: Annotated[float | None, BeforeValidator(_bits)] = Field(
        default=None, alias="bandwidth", examples=["9.6kbit/s"]
    )
    every_s: Annotated[float | None, seconds(0.05, 3600)] = Field(default=None, alias="every", examples=["2s"])
    kill: StrictBool = False

    @property
    def label(self) -> str:
        """The line in words: "up, 600 ms, 9.6 kbit/s"."""
        parts: list[str] = [self.link]
        if self.latency_s:
            parts.append(show_duration(self.latency_s))
        if self.bandwidth_bit_s is not None:
            unit = next(unit for unit in ("Gbit/s", "Mbit/s", "kbit/s") if self.bandwidth_bit_s >= _BITS[unit])
            parts.append(f"{self.bandwidth_bit_s / _BITS[unit]:.4g} {unit}")
        return ", ".join(parts)

    @property
    def is_cut(self) -> bool:
        return self.link in CUTS


class Limits(_Table):
    """`[limits]`: what a promise may cost at most; what is not there is not judged (the first five always are)."""

    lost: Annotated[StrictInt, Field(ge=0)] = 0
    reordered: Annotated[StrictInt, Field(ge=0)] = 0
    unacknowledged: Annotated[StrictInt, Field(ge=0)] = 0
    unaccounted: Annotated[StrictInt, Field(ge=0)] = 0
    duplicates_per_cut: Annotated[Rate, Field(ge=0)] = 0
    resume_p99_s: Annotated[float | None, seconds(0.001, 3600)] = Field(
        default=None, alias="resume_p99", examples=["1s"]
    )
    drain_s: Annotated[float | None, seconds(0.001, 86400)] = Field(default=None, alias="drain", examples=["5s"])
    slowest_ratio: Annotated[Rate, Field(ge=1)] | None = None
    connections_per_cut: Annotated[Rate, Field(ge=0)] | None = None
    ack_p99_s: Annotated[float | None, seconds(0.001, 3600)] = Field(default=None, alias="ack_p99", examples=["1s"])
    latency_p99_s: Annotated[float | None, seconds(0.001, 86400)] = Field(
        default=None, alias="latency_p99", examples=["2s"]
    )
    urgent_p99_s: Annotated[float | None, seconds(0.001, 86400)] = Field(
        default=None, alias="urgent_p99", examples=["2s"]
    )
    memory_bytes: Annotated[int, size(1 << 20)] | None = Field(default=None, alias="memory", examples=["128MiB"])


class Scenario(_Table):
    """The whole file."""

    title: str = Field(min_length=1, max_length=200, description="what it is about", examples=["A base tunnel"])
    about: str = Field(default="", max_length=2000, examples=["57 km of rock, twice an hour."])
    repeat: Annotated[StrictInt, Field(ge=1, le=REPEAT_MAX)] = 1
    settle_s: Annotated[float, seconds(1, 3600)] = Field(default=30.0, alias="settle", examples=["30s"])
    gateways: Gateways = Gateways()
    hub: Hub = Hub()
    apps: Annotated[
        tuple[AppTable, ...], _some("at least one app", '[[app]], and name = "telemetry" and rate = 10 under it')
    ] = Field(default=(), alias="app", max_length=50, validate_default=True)
    steps: Annotated[
        tuple[Step, ...], _some("at least one step", '[[step]], and link = "up" and for = "10s" under it')
    ] = Field(default=(), alias="step", max_length=STEPS_MAX, validate_default=True)
    limits: Limits = Limits()

    def timetable(self, scale: float = 1.0) -> Iterator[tuple[float, float, Step]]:
        """Start, end (seconds since the beginning) and step, in order. `scale` shortens durations, nothing else."""
        at = 0.0
        for _ in range(self.repeat):
            for step in self.steps:
                yield at, at + step.for_s * scale, step
                at += step.for_s * scale

    def duration_s(self, scale: float = 1.0) -> float:
        """How long the timetable is."""
        return self.repeat * sum(step.for_s for step in self.steps) * scale

    def ways(self, direction: Direction) -> tuple[AppTable, ...]:
        return tuple(app for app in self.apps if app.direction == direction)


def load(path: Path) -> Scenario:
    """Read and check the file. Raises ConfigErrors with every problem in it."""
    return loads(read_document(path, "a scenario"), file=str(path))


def loads(data: bytes | str, *, file: str = "scenario") -> Scenario:
    """As `load`, from the content itself."""
    raw, lines = toml_document(data, file)
    report = Report(Scenario, file, raw, lines)
    scenario: Scenario | None = None
    try:
        scenario = Scenario.model_validate(raw)
    except ValidationError as errors:
        for each in errors.errors(include_url=False):
            report.add_from_pydantic(each["type"], each["loc"], each.get("ctx") or {}, each["msg"])
    if scenario is not None:
        _check_together(scenario, report)
        if not report.problems:
            _check_config(scenario, report)
    if report.problems or scenario is None:
        raise ConfigErrors(report.problems)
    return scenario


def _check_together(scenario: Scenario, report: Report) -> None:
    """What no single key can know."""
    for number, step in enumerate(scenario.steps):
        if step.link == "flapping" and step.every_s is None:
            report.add(("step", number, "every"), "how long the line stays as it is", 'every = "2s"', missing=True)
        if step.link in ("hub-slow",) and not step.latency_s:
            report.add(("step", number, "latency"), "how late the hub answers", 'latency = "2s"', missing=True)
        if step.link == "hub-restart" and scenario.hub.url is not None:
            report.add(("step", number, "link"), "another word, as a hub given by its URL is not ours to restart")
        if step.jitter_s > step.latency_s:
            report.add(("step", number, "jitter"), "at most the latency")
    if scenario.limits.urgent_p99_s is not None and not any(app.class_ == "urgent" for app in scenario.ways("up")):
        report.add(("limits", "urgent_p99"), 'an app with class = "urgent" that it is about')
    if not scenario.ways("up"):
        report.add(("app",), 'at least one app with direction "up", as the verdict is about its messages')
    seen: dict[str, int] = {}
    for number, app in enumerate(scenario.apps):
        if seen.setdefault(app.name, number) != number:
            report.add(("app", number, "name"), f"a name that no other app has (app[{seen[app.name]}] has it)")
    streams: dict[str, AppTable] = {}
    for number, app in enumerate(scenario.apps):
        first = streams.setdefault(app.stream_name, app)
        if (first.direction, first.class_) != (app.direction, app.class_):
            report.add(
                ("app", number, "stream" if app.stream else "name"),
                f"a stream of its own, as app {first.name} has it with another direction or class",
                f'stream = "{app.name}"',
            )
    total = scenario.duration_s() * scenario.gateways.count * sum(app.rate for app in scenario.apps)
    if total > MESSAGES_MAX:
        report.add(("app",), f"at most {MESSAGES_MAX:,} messages in all, and these steps make {total:,.0f}")


def _check_config(scenario: Scenario, report: Report) -> None:
    """The gateway's own configuration, checked by the daemon's own rules before a daemon is started."""
    from gateway.simulate.fleet import gateway_config as make

    text = make(scenario, scenario.gateways.names[0], "/var/lib/lineside", 1883, scenario.hub.url, 5672)
    try:
        gateway_config.loads(text, file="config")
    except ConfigErrors as errors:
        for problem in errors.problems:
            keys = [each for each in re.split(r"[\[\].]", problem.key) if each and not each.isdigit()]
            told = _config_loc(scenario, keys)
            report.add(told, problem.expected, problem.write)


def _config_loc(scenario: Scenario, keys: list[str]) -> tuple[str | int, ...]:
    """Where in the scenario a key of the gateway's configuration comes from."""
    if keys and keys[0] in scenario.gateways.config:
        return ("gateways", "config", *keys)
    return ("hub", *keys[1:]) if keys and keys[0] == "hub" else ("gateways", "config")


def shipped() -> dict[str, Path]:
    """Name and file of every scenario that comes with Lineside."""
    directory = resources.files("gateway.simulate") / "scenarios"
    with resources.as_file(directory) as path:
        return {file.stem: file for file in sorted(path.glob("*.toml"))}


def find(name: str) -> Path:
    """The file that a person means: a path, or the name of one that comes with Lineside. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    import difflib

    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "`lineside simulate --list` names those that come with Lineside"
    raise ConfigError(f"{json.dumps(name)} is neither a file nor a scenario that comes with Lineside; {hint}")
