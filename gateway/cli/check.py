"""`run`, `check` and `demo`: the commands that start from the configuration."""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli.output import config_option, json_option, print_json, safe

if TYPE_CHECKING:
    from gateway.config import Config


@click.command()
@config_option
def run(config: Path) -> None:
    """Run the gateway until it is told to stop (SIGTERM or SIGINT; SIGHUP reads the configuration again)."""
    from gateway.config_reading import Reading

    reading = Reading(config)
    # It goes on while this takes as long. What is imported stays: looking for garbage in it is a tenth of that time.
    gc.disable()
    from gateway.app import run_daemon

    gc.freeze()
    gc.enable()
    sys.exit(run_daemon(config, reading))


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True, help="How long to run.")
@json_option
def demo(seconds: float, as_json: bool) -> None:
    """Show a gateway at work: hub, gateway, tunnel and apps in one command, which needs nothing else."""
    from gateway.demo import run_demo

    sys.exit(run_demo(seconds, as_json))


@click.command()
@config_option
@click.option(
    "--who",
    multiple=True,
    metavar="WHO",
    help="Ask about somebody: user:NAME (or NAME), cn:NAME, client:ID, uid:NUMBER, address:IP, protocol:amqp; "
    "several make one peer.",
)
@click.option("--publish", metavar="TOPIC", help="May WHO publish to it?")
@click.option("--subscribe", metavar="FILTER", help="May WHO subscribe to it?")
@json_option
def check(config: Path, who: tuple[str, ...], publish: str | None, subscribe: str | None, as_json: bool) -> None:
    """Explain the configuration, or say what is wrong with it, line by line (exit status 2).

    With --who, and --publish or --subscribe, explain whether the access rules allow that: exit status 0 if they do, 1
    if not.
    """
    from gateway.config import ConfigErrors, load
    from gateway.config_explain import explain

    asked = bool(who) or publish is not None or subscribe is not None
    if asked and (publish is None) == (subscribe is None):
        raise click.UsageError("Give one of --publish TOPIC and --subscribe FILTER beside --who.")
    try:
        # Who asks about rules need not be allowed to read keys and passwords.
        loaded = load(config, check_files=not asked)
    except ConfigErrors as errors:
        if not as_json:
            raise
        print_json({"ok": False, "problems": [asdict(problem) for problem in errors.problems]})
        sys.exit(2)
    if asked:
        sys.exit(_explain_access(loaded, who, publish, subscribe, as_json))
    lines = explain(loaded)
    if as_json:
        notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
        told = [line for line in lines if not line.startswith("note: ")]
        print_json({"ok": True, "problems": [], "explained": told, "notes": notes})
    else:
        click.echo("\n".join([f"{config}: no problem found", *lines]))


def _explain_access(
    config: Config, who: tuple[str, ...], publish: str | None, subscribe: str | None, as_json: bool
) -> int:
    from gateway.access import rules_of
    from gateway.mqtt.topics import check_filter, check_topic
    from security.rules import Action, Verdict, decide, parse_identity

    try:
        check_topic(publish) if publish is not None else check_filter(subscribe or "")
    except ValueError as error:  # nobody can, whatever the rules say
        hint = "--publish" if publish is not None else "--subscribe"
        raise click.BadParameter(f"{error}.", param_hint=hint) from None
    try:
        identity = parse_identity(who)
    except ValueError as error:
        raise click.BadParameter(str(error.args[0]), param_hint="--who") from None
    action, name = (Action.PUBLISH, publish) if publish is not None else (Action.SUBSCRIBE, subscribe)
    assert name is not None
    allowed = config.allows_anonymous(identity.protocol)
    if identity.anonymous and not (identity.local if allowed is None else allowed):
        where = "" if identity.local else f" from {identity.address}"
        text = f"refused, as anonymous apps are not let in{where} ([{identity.protocol}] allow_anonymous)"
        verdict = Verdict(False, text)
    else:
        verdict = decide(rules_of(config), identity, action, name)
    if as_json:
        rule = verdict.clause.rule.place if verdict.clause is not None else None
        pattern = verdict.clause.pattern if verdict.clause is not None else None
        print_json(
            {
                "allowed": verdict.allowed,
                "who": str(identity),
                "action": action.name.lower(),
                "name": name,
                "rule": rule,
                "pattern": pattern,
                "explained": verdict.text,
            }
        )
    else:
        click.echo(safe(f"{identity}, {action.value} {name}: {verdict.text}"))
    return 0 if verdict.allowed else 1
