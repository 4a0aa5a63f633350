"""`status`, `backlog`, `show`, `export`, `deadletter`, `losses`, `clients`: what the gateway holds and does.

The journal is read directly, so most of these answer with the daemon stopped. What only the daemon knows (links,
connected clients, rates) is asked through its control socket.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gateway.cli.output import (
    json_body,
    json_option,
    print_json,
    resolve_keys,
    resolve_state_dir,
    safe,
    show_body,
    show_bytes,
    show_seconds,
    show_time,
    state_options,
)
from gateway.cli.tables import print_table
from gateway.config_values import show_rate
from gateway.errors import LinesideError

IDS_A_REQUEST = 10_000

limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1, max=1_000_000),
    default=100,
    show_default=True,
    help="How many at most.",
)


# ------------------------------------------------------------------------------------------------------- status


@click.command()
@state_options
@click.option("--running", is_flag=True, help="Exit with status 1 where the daemon does not answer: for health checks.")
@json_option
def status(config: Path, state_dir: Path | None, running: bool, as_json: bool) -> None:
    """Links, streams and rates; from the journal alone when the daemon is stopped."""
    from gateway.control_client import DaemonStopped, request

    where = resolve_state_dir(config, state_dir)
    try:
        answer = request(where, "status")
    except DaemonStopped:
        answer = _status_from_journal(where)
    else:
        answer = {"daemon": "running", **answer}
    if as_json:
        print_json(answer)
    else:
        _print_status(answer)
    if running and answer["daemon"] != "running":
        sys.exit(1)


def _status_from_journal(state_dir: Path) -> dict[str, Any]:
    from storeforward.inspection import Inspection

    with Inspection(state_dir) as journal:
        return {
            "daemon": "stopped",
            "epoch": int(journal.meta().get("epoch", 0)),
            "streams": [asdict(stream) for stream in journal.streams()],
            "losses": sum(total.messages for total in journal.loss_totals()),
            "dead": journal.dead_count(),
        }


def _print_status(answer: Mapping[str, Any]) -> None:
    facts: list[tuple[str, str]] = []
    if answer["daemon"] == "running":
        facts.append(("gateway", str(answer.get("gateway", "-"))))
        pid, uptime = answer.get("pid", "-"), show_seconds(answer.get("uptime_s"))
        facts.append(("daemon", f"running, pid {pid}, version {answer.get('version', '-')}, up {uptime}"))
        mqtt = answer.get("mqtt") or {}
        listen = ", ".join(str(each) for each in mqtt.get("listen", ())) or "-"
        facts.append(("mqtt", f"{listen}, {mqtt.get('clients', 0)} clients"))
        rates = answer.get("rates") or {}
        in_out = f"{rates.get('in_per_s', 0):.1f} in, {rates.get('out_per_s', 0):.1f} out"
        facts.append(("messages a second", in_out))
        commit = answer.get("commit_ms") or {}
        facts.append(("commit", f"{commit.get('p50') or 0:.1f} ms median, {commit.get('p99') or 0:.1f} ms p99"))
        facts.append(("memory", show_bytes(answer.get("rss_bytes"))))
        if answer.get("written_bytes") is not None:
            facts.append(("written to disk", f"{show_bytes(answer['written_bytes'])} since the start"))
    else:
        facts.append(("daemon", "stopped"))
    clock = answer.get("clock") or {"set": True}
    if not clock["set"]:
        facts.append(("clock", f"NOT SET: it says {clock.get('wall')}; certificates can't be judged"))
    facts.append(("losses", f"{answer.get('losses', 0)} messages (lineside losses)"))
    facts.append(("dead letters", f"{answer.get('dead', 0)} (lineside deadletter list)"))
    width = max(len(name) for name, _ in facts) + 2
    for name, fact in facts:
        click.echo(f"{name + ':':{width}}{safe(fact)}")
    if answer.get("bridge"):
        _print_bridge(answer["bridge"])
    if answer.get("hubs"):
        click.echo()
        columns = ["hub", "state", "since", "url", ">rate", "error", "retry in"]
        print_table(columns, [_hub_row(h) for h in answer["hubs"]])
    if answer.get("certificates"):
        click.echo()
        _print_certificates(answer["certificates"])
    click.echo()
    _print_streams(answer.get("streams") or [])


def _print_bridge(bridge: Mapping[str, Any]) -> None:
    state = str(bridge.get("state"))
    if bridge.get("held"):
        state += ", held: a stream is full"
    click.echo()
    print_table(
        ["bridge", "state", "since", "error", "retry in", ">received", ">unacknowledged", ">published", ">in flight"],
        [
            [
                bridge.get("url"),
                state,
                show_seconds(bridge.get("since_s")),
                bridge.get("error") or "-",
                show_seconds(bridge.get("retry_in_s")),
                bridge.get("received", 0),
                bridge.get("unacknowledged", 0),
                bridge.get("published", 0),
                bridge.get("in_flight", 0),
            ]
        ],
    )


def _print_certificates(certificates: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        [each["for"], each["state"], each["not_after"] or each["error"], each["days_left"] or "-", each["file"]]
        for each in certificates
    ]
    print_table(["certificate", "state", "ends", ">days left", "file"], rows)


def _hub_row(hub: Mapping[str, Any]) -> list[object]:
    since, retry = show_seconds(hub.get("since_s")), show_seconds(hub.get("retry_in_s"))
    return [
        hub.get("name"),
        hub.get("state"),
        since,
        hub.get("url") or "-",
        _rate(hub),
        hub.get("error") or "; ".join(hub.get("notes", [])) or "-",
        retry,
    ]


def _rate(hub: Mapping[str, Any]) -> str:
    """What the line was last seen to carry, and what it may at most."""
    measured, limit = hub.get("rate_bytes_s"), hub.get("rate_limit_bytes_s")
    if limit:
        return f"at most {show_rate(limit)}"
    return f"about {show_rate(measured)}" if measured else "-"


def _print_streams(streams: Iterable[Mapping[str, Any]]) -> None:
    """Streams as the daemon or the journal tells them: each knows a little that the other does not."""
    cells = [
        {
            "stream": stream["name"],
            "direction": stream["direction"],
            "class": _class(stream),
            ">waiting": stream.get("waiting"),
            ">stored": stream["rows"],
            ">size": show_bytes(stream["bytes"]),
            ">next seq": stream["next_seq"],
            ">full": _per_cent(stream),
            ">in flight": stream.get("in_flight"),
            "oldest": show_time(stream["oldest_us"]) if stream.get("oldest_us") is not None else None,
        }
        for stream in streams
    ]
    columns = [name for name in (cells[0] if cells else {}) if any(row[name] is not None for row in cells)]
    rows = [["-" if row[name] is None else row[name] for name in columns] for row in cells]
    print_table(columns, rows, "no streams yet")


def _class(stream: Mapping[str, Any]) -> str | None:
    """How it is sent, and how much of a full line that is."""
    if stream.get("share") is None:
        return stream.get("class")
    return f"{stream.get('class')} {stream['share']} %"


def _per_cent(stream: Mapping[str, Any]) -> str | None:
    shares = [
        100 * stream[used] / stream[limit]
        for used, limit in (("bytes", "max_bytes"), ("rows", "max_messages"))
        if stream.get(limit)
    ]
    return f"{max(shares):.0f} %" if shares else None


# ------------------------------------------------------------------------------------------------------ backlog


@click.command()
@click.argument("stream", nargs=-1, metavar="[STREAM]")
@limit_option
@click.option("--from", "from_seq", type=click.IntRange(min=0), help="The first seq to list.")
@state_options
@json_option
def backlog(
    stream: tuple[str, ...],
    limit: int,
    from_seq: int | None,
    config: Path,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """What waits in every stream; or, given a STREAM, its messages in the order they will go.

    See one message with `lineside show STREAM SEQ`, all of them with `lineside export STREAM`.
    """
    if len(stream) > 1:
        hint = f" Did you mean `lineside {' '.join(stream)}`?" if stream[0] in ("show", "export") else ""
        raise click.UsageError(f"backlog takes one STREAM.{hint}")
    from storeforward.inspection import Inspection

    with Inspection(resolve_state_dir(config, state_dir), resolve_keys(config)) as journal:
        if not stream:
            summaries = [asdict(each) for each in journal.streams()]
            cursors = [asdict(each) for each in journal.cursors()]
            if as_json:
                print_json({"streams": summaries, "cursors": cursors})
            else:
                _print_streams(summaries)
                _print_cursors(cursors)
            return
        messages = journal.backlog(stream[0], limit, from_seq)
    if as_json:
        print_json({"stream": stream[0], "messages": [asdict(message) for message in messages]})
        return
    rows = [[each.seq, show_time(each.time_us), each.topic, each.size] for each in messages]
    print_table([">seq", "time", "topic", ">bytes"], rows, "nothing waits")
    if len(messages) == limit:
        click.echo(f"(the first {limit}: --limit N for more, --from {messages[-1].seq + 1} to go on)", err=True)


def _print_cursors(cursors: Iterable[Mapping[str, Any]]) -> None:
    rows = [[each["stream"], each["kind"], each["name"], each["position"], each["behind"]] for each in cursors]
    if rows:
        click.echo()
        print_table(["stream", "reader", "name", ">next seq", ">behind"], rows)


@click.command()
@click.argument("stream")
@click.argument("seq", type=click.IntRange(min=0))
@state_options
@json_option
def show(stream: str, seq: int, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """One message of STREAM: where it came from, its properties and its payload."""
    from storeforward.inspection import Inspection

    with Inspection(resolve_state_dir(config, state_dir), resolve_keys(config)) as journal:
        found = journal.show(stream, seq)
    _print_message(asdict(found), as_json)


@click.command()
@click.argument("stream")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A new file, instead of the terminal.",
)
@state_options
@json_option
def export(stream: str, output: Path | None, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """Every message of STREAM in order, one JSON object a line (with or without --json)."""
    from storeforward.inspection import Inspection

    with Inspection(resolve_state_dir(config, state_dir), resolve_keys(config)) as journal:
        messages = journal.export(stream, describe)
        if output is None:
            _write_lines(messages, sys.stdout.write)
            return
        try:
            with output.open("x", encoding="utf-8") as file:
                count = _write_lines(messages, file.write)
        except OSError as error:
            raise LinesideError(f"{output}: {error.strerror}") from None
    if as_json:
        print_json({"stream": stream, "messages": count, "output": str(output)})
    else:
        click.echo(f"{count} messages of {stream} in {output}")


def _write_lines(messages: Iterable[Mapping[str, Any]], write: Callable[[str], Any]) -> int:
    count = 0
    for message in messages:
        write(json.dumps(message, default=str) + "\n")
        count += 1
    return count


def describe(body: bytes) -> dict[str, Any]:
    """What the encoded message says, fit for JSON; `{"error": ...}` for bytes that are no message."""
    from gateway.amqp.message import decode

    try:
        message = decode(body)
    except LinesideError as error:
        return {"error": str(error)}
    told = {
        "message_id": message.message_id,
        "to": message.to,
        "subject": message.subject,
        "reply_to": message.reply_to,
        "correlation_id": message.correlation_id,
        "content_type": message.content_type,
        "ttl_ms": message.ttl_ms,
        "application_properties": message.application_properties or None,
        "annotations": message.annotations or None,
    }
    out = {name: _plain(value) for name, value in told.items() if value is not None}
    return {**out, "body": json_body(bytes(message.body))}


def _plain(value: Any) -> Any:
    """A value of AMQP's types as one of JSON's."""
    if isinstance(value, bytes | bytearray | memoryview):
        return json_body(bytes(value))
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _print_message(stored: dict[str, Any], as_json: bool) -> None:
    body: bytes = stored.pop("body")
    told = describe(body)
    if as_json:
        import base64

        coded = base64.b64encode(body).decode("ascii")
        print_json({**stored, "size": len(body), "message": told, "body_base64": coded})
        return
    facts: dict[str, Any] = {**stored, "size": f"{len(body)} bytes encoded"}
    facts["time"] = show_time(facts.pop("time_us"))
    if facts.pop("expires_age_us", None) is not None:
        facts["expires"] = "yes"
    facts["intact"] = "yes" if facts["intact"] else "NO: the bytes do not match their checksum"
    payload = told.pop("body", {})
    for name in ("application_properties", "annotations"):
        for key, value in told.pop(name, {}).items():
            told[f"{name.replace('_', ' ')} {key}"] = value
    facts.update(told)
    for name, value in facts.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"{safe(name.replace('_', ' ')) + ':':18} {safe(shown)}")
    click.echo()
    if "base64" in payload:
        import base64

        click.echo(show_body(base64.b64decode(payload["base64"])))
    else:
        lines = payload.get("text", "").split("\n")
        click.echo("\n".join(safe(line) for line in lines))


# --------------------------------------------------------------------------------------------------- deadletter


@click.group()
def deadletter() -> None:
    """Messages the hub would not take: see why, send them again, or give them up."""


@deadletter.command("list")
@click.option("--stream", help="Only those of this stream.")
@limit_option
@state_options
@json_option
def deadletter_list(stream: str | None, limit: int, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """The newest dead letters first."""
    from storeforward.inspection import Inspection

    with Inspection(resolve_state_dir(config, state_dir), resolve_keys(config)) as journal:
        letters = journal.dead(limit, stream)
        count = len(letters) if len(letters) < limit else journal.dead_count()
    if as_json:
        print_json({"dead": [asdict(letter) for letter in letters], "count": count})
        return
    rows = [
        [
            each.id,
            show_time(each.time_us),
            each.stream,
            each.seq,
            each.topic,
            each.size,
            each.condition,
            each.description or "-",
        ]
        for each in letters
    ]
    columns = [">id", "time", "stream", ">seq", "topic", ">bytes", "condition", "description"]
    print_table(columns, rows, "no dead letters")
    if len(letters) == limit:
        click.echo(f"(the newest {limit}: --limit N for more)", err=True)


@deadletter.command("show")
@click.argument("id", type=int)
@state_options
@json_option
def deadletter_show(id: int, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """One dead letter, with the hub's reason and the payload."""
    from storeforward.inspection import Inspection

    with Inspection(resolve_state_dir(config, state_dir), resolve_keys(config)) as journal:
        found = journal.dead_show(id)
    _print_message(asdict(found), as_json)


@deadletter.command("requeue")
@click.argument("ids", type=int, nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
@click.option("--stream", help="With --all: only those of this stream.")
@state_options
@json_option
def deadletter_requeue(
    ids: tuple[int, ...],
    every: bool,
    stream: str | None,
    config: Path,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Send dead letters again, by their IDS: they join the end of their streams."""
    where = resolve_state_dir(config, state_dir)
    chosen = _chosen(where, ids, every, stream)
    count = _act(where, config, "requeue", chosen) if chosen else 0
    _report_count(count, len(chosen), "requeued", as_json)


@deadletter.command("drop")
@click.argument("ids", type=int, nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
@click.option("--stream", help="With --all: only those of this stream.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@state_options
@json_option
def deadletter_drop(
    ids: tuple[int, ...],
    every: bool,
    stream: str | None,
    yes: bool,
    config: Path,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Give dead letters up, by their IDS. Each leaves a row in the loss ledger."""
    where = resolve_state_dir(config, state_dir)
    chosen = _chosen(where, ids, every, stream)
    if chosen and every and not yes:
        click.confirm(f"Drop {len(chosen)} dead letters for good?", abort=True, err=True)
    count = _act(where, config, "drop", chosen) if chosen else 0
    _report_count(count, len(chosen), "dropped", as_json)


def _chosen(state_dir: Path, ids: tuple[int, ...], every: bool, stream: str | None) -> list[int]:
    if bool(ids) == every:
        raise click.UsageError("Give either IDS (see `lineside deadletter list`) or --all.")
    if stream is not None and not every:
        raise click.UsageError("--stream goes with --all.")
    if not every:
        return list(dict.fromkeys(ids))
    from storeforward.inspection import Inspection

    with Inspection(state_dir) as journal:
        return journal.dead_ids(stream)


def _act(state_dir: Path, config: Path, what: str, ids: list[int]) -> int:
    """By the daemon if one runs, else on the journal itself; return how many there were."""
    from gateway.control_client import DaemonStopped

    done = 0
    try:
        for start in range(0, len(ids), IDS_A_REQUEST):
            done += _ask(state_dir, what, ids[start : start + IDS_A_REQUEST])
        return done
    except DaemonStopped:
        if done:
            raise LinesideError(f"the daemon stopped after {done} of {len(ids)}; try the rest again") from None
        from storeforward.inspection import Inspection
        from storeforward.maintenance import drop_dead, requeue_dead

        with Inspection(state_dir):
            pass  # so that a mistyped directory is complained about, and not filled with an empty journal
        seal = resolve_keys(config)
        become_owner(state_dir)
        return (requeue_dead if what == "requeue" else drop_dead)(state_dir, ids, seal)


def _ask(state_dir: Path, what: str, ids: list[int]) -> int:
    from gateway.control_client import ControlError, request

    count = request(state_dir, f"deadletter-{what}", ids=ids, timeout_s=60).get("count")
    if not isinstance(count, int):
        raise ControlError("the daemon's answer does not say how many; do its version and this one agree?")
    return count


def become_owner(state_dir: Path) -> None:
    """As root, leave no file behind that the daemon's own user could not open."""
    owner = state_dir.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups([])
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)


def _report_count(count: int, asked: int, done: str, as_json: bool) -> None:
    """Say how many; exit 1 if some of those asked for were not there."""
    if as_json:
        print_json({done: count, "asked": asked})
    else:
        click.echo(f"{done} {count} of {asked} dead letters")
    if count < asked:
        click.echo(f"lineside: {asked - count} of them were not there, or their stream is gone", err=True)
        sys.exit(1)


# --------------------------------------------------------------------------------------------- losses and clients


@click.command()
@click.option("--stream", help="Only those of this stream.")
@limit_option
@state_options
@json_option
def losses(stream: str | None, limit: int, config: Path, state_dir: Path | None, as_json: bool) -> None:
    """The loss ledger: totals first, then the newest rows."""
    from storeforward.inspection import Inspection

    with Inspection(resolve_state_dir(config, state_dir), resolve_keys(config)) as journal:
        totals, rows = journal.loss_totals(stream), journal.losses(limit, stream)
        if stream is not None and not totals and not rows:
            journal.require_stream(stream)  # "nothing was lost" would be no answer to a mistyped name
    if as_json:
        print_json({"totals": [asdict(total) for total in totals], "losses": [asdict(row) for row in rows]})
        return
    if not totals and not rows:
        click.echo("nothing was lost")
        return
    total_rows = [[each.stream, each.reason, each.messages, show_bytes(each.bytes)] for each in totals]
    print_table(["stream", "reason", ">messages", ">size"], total_rows)
    click.echo()
    cells = [
        [show_time(each.time_us), each.stream, each.seq, each.reason, each.size, each.detail or "-"] for each in rows
    ]
    print_table(["time", "stream", ">seq", "reason", ">bytes", "detail"], cells, "no single rows kept")


@click.command()
@state_options
@json_option
def clients(config: Path, state_dir: Path | None, as_json: bool) -> None:
    """Who is connected; with the daemon stopped, the sessions that wait in the journal."""
    from gateway.control_client import DaemonStopped, request

    where = resolve_state_dir(config, state_dir)
    try:
        answer = {"daemon": "running", **request(where, "clients")}
    except DaemonStopped:
        from storeforward.inspection import Inspection

        with Inspection(where) as journal:
            away = [
                {"client": each.client_id, "durable": True, "subscriptions": each.subscriptions}
                for each in journal.sessions()
            ]
        answer = {"daemon": "stopped", "clients": [], "away": away}
    if as_json:
        print_json(answer)
        return
    if answer["daemon"] == "stopped":
        click.echo("daemon: stopped; sessions in the journal:")
    listed = [
        {"client": each.get("client"), "connected": connected, **each}
        for key, connected in (("clients", "yes"), ("away", "no"))
        for each in answer.get(key) or ()
    ]
    columns = list(dict.fromkeys(key for each in listed for key in each))
    rows = [[_cell(each.get(column)) for column in columns] for each in listed]
    print_table([column.replace("_", " ") for column in columns], rows, "no clients")


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
