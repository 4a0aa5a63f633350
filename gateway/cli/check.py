"""`run`, `check` and `demo`: the commands that start from the configuration."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from gateway.cli.output import config_option, json_option, print_json


@click.command()
@config_option
def run(config: Path) -> None:
    """Run the gateway until it is told to stop (SIGTERM or SIGINT; SIGHUP reads the configuration again)."""
    from gateway.app import run_daemon

    sys.exit(run_daemon(config))


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True, help="How long to run.")
@json_option
def demo(seconds: float, as_json: bool) -> None:
    """Show a gateway at work: hub, gateway, tunnel and apps in one command, which needs nothing else."""
    from gateway.demo import run_demo

    sys.exit(run_demo(seconds, as_json))


@click.command()
@config_option
@json_option
def check(config: Path, as_json: bool) -> None:
    """Explain the configuration, or say what is wrong with it, line by line (exit status 2)."""
    from gateway.config import ConfigErrors, explain, load

    try:
        lines = explain(load(config))
    except ConfigErrors as errors:
        if not as_json:
            raise
        print_json({"ok": False, "problems": [asdict(problem) for problem in errors.problems]})
        sys.exit(2)
    if as_json:
        notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
        told = [line for line in lines if not line.startswith("note: ")]
        print_json({"ok": True, "problems": [], "explained": told, "notes": notes})
    else:
        click.echo("\n".join([f"{config}: no problem found", *lines]))
