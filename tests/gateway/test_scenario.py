"""Scenario files: what is refused and how it is told; what a step means in toxics; when a verdict says no."""

from __future__ import annotations

import pytest

from gateway import config
from gateway.config import ConfigErrors
from gateway.errors import ConfigError
from gateway.simulate import verdict
from gateway.simulate.fleet import Tally, gateway_config
from gateway.simulate.proxy import LineState, line_state
from gateway.simulate.runner import Returns
from gateway.simulate.scenario import Limits, Scenario, Step, find, load, loads, shipped

GOOD = """\
title = "A tunnel"

[[app]]
name = "telemetry"
rate = 10

[[step]]
link = "tunnel"
for = "10s"
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as told:
        loads(text, file="s.toml")
    return [str(problem) for problem in told.value.problems]


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_scenario_loads_moves_messages_up_and_says_what_it_is_about(name: str) -> None:
    scenario = load(shipped()[name])
    assert scenario.ways("up")
    assert scenario.about
    assert scenario.duration_s() > 30


def test_at_least_eight_scenarios_come_with_lineside() -> None:
    assert len(shipped()) >= 8


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("title", "titel"), 's.toml:1: titel: found "A tunnel", expected one of the tables title'),
        (
            ('link = "tunnel"', 'link = "tunel"'),
            's.toml:8: step[0].link: found "tunel", expected one of "up", "tunnel"',
        ),
        (('for = "10s"', "for = 10"), "s.toml:9: step[0].for: found 10, expected a duration with its unit"),
        (
            ('for = "10s"', 'for = "10s"\nbandwidth = "fast"'),
            's.toml:10: step[0].bandwidth: found "fast", expected a b',
        ),
        (
            ('for = "10s"', 'for = "10s"\njitter = "1s"'),
            's.toml:10: step[0].jitter: found "1s", expected at most the l',
        ),
        (("rate = 10", "rate = 0"), "s.toml:5: app[0].rate: found 0, expected"),
        (("rate = 10", 'rate = 10\nsize = "4B"'), 's.toml:6: app[0].size: found "4B", expected a size from 32B'),
        (("rate = 10", 'rate = 10\ntopic = "a/#"'), 's.toml:6: app[0].topic: found "a/#", expected a topic to publish'),
        (("rate = 10", 'rate = 10\ndirection = "down"'), "expected at least one app with direction"),
        (("rate = 10", "rate = 40000\n[gateways]\ncount = 100"), "expected at most 5,000,000 messages in all"),
        (('"tunnel"', '"flapping"'), "step[0].every: found nothing, expected how long the line stays as it is"),
        (('"tunnel"', '"hub-slow"'), "step[0].latency: found nothing, expected how late the hub answers"),
        (
            ("[[step]]", '[hub]\nurl = "amqp://10.0.0.1"\n[[step]]'),
            'hub.url: found "amqp://10.0.0.1", expected a hub on',
        ),
        (
            ("[[app]]", '[gateways.config.hub]\nidle_timeout = "5"\n[[app]]'),
            "s.toml:4: gateways.config.hub.idle_t",
        ),
        (
            ("[[app]]", "[gateways.config.hub]\nwindows = 5\n[[app]]"),
            "gateways.config.hub.windows: found 5",
        ),
        (("[[app]]", '[limits]\nlost = "none"\n[[app]]'), 'limits.lost: found "none", expected a whole number'),
        (("[[app]]", "[[app"), "s.toml:3: found"),
    ],
)
def test_what_is_wrong_is_told_with_file_line_and_key(change: tuple[str, str], expected: str) -> None:
    told = problems(GOOD.replace(*change, 1))
    assert any(expected in each for each in told), told


def test_a_scenario_without_apps_or_steps_is_told_what_to_write() -> None:
    told = problems('title = "Nothing"\n')
    assert any('expected at least one app; write [[app]], and name = "telemetry"' in each for each in told), told
    assert any('expected at least one step; write [[step]], and link = "up"' in each for each in told), told


def test_two_apps_share_a_stream_only_in_the_same_direction() -> None:
    two = GOOD + '\n[[app]]\nname = "orders"\nrate = 1\ndirection = "down"\nstream = "telemetry"\n'
    assert "app[1].stream" in problems(two)[0]


def test_an_unknown_scenario_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean base-tunnel"):
        find("base-tunel")


def test_the_scale_shortens_durations_and_nothing_else() -> None:
    scenario = loads(GOOD.replace('title = "A tunnel"', 'title = "A tunnel"\nrepeat = 3'))
    assert [end for _, end, _ in scenario.timetable(0.1)] == pytest.approx([1, 2, 3])
    assert scenario.apps[0].rate == 10


def test_a_gateways_configuration_takes_the_scenarios_overrides() -> None:
    scenario = loads(GOOD.replace("[[app]]", "[gateways.config.hub]\nwindow = 7\n[[app]]", 1))
    made = config.loads(gateway_config(scenario, "loco-1", "/nowhere", 1883, None, 5672))
    assert made.hubs[0].window == 7
    assert made.outbound[0].address_for("loco-1") == "edge.loco-1.telemetry"


def step(**keys: object) -> Step:
    return Step.model_validate({"for": "10s"} | keys)


@pytest.mark.parametrize(
    ("link", "toxics"),
    [
        ("up", set()),
        ("tunnel", {"timeout_upstream", "timeout_downstream"}),
        ("reset", {"reset_peer_upstream", "reset_peer_downstream"}),
        ("acks-lost", {"timeout_downstream"}),
        ("half-open", {"slow_close_downstream"}),
        ("stall", {"latency_upstream", "latency_downstream"}),
        ("hub-slow", {"latency_downstream"}),
    ],
)
def test_each_kind_of_line_is_a_set_of_toxics(link: str, toxics: set[str]) -> None:
    made = line_state(step(link=link, latency="1s" if link == "hub-slow" else "0s"))
    assert {spec.name for spec in made.toxics} == toxics
    assert made.enabled
    assert made.sever == (link == "half-open")


def test_a_line_closed_with_a_fin_is_a_disabled_proxy() -> None:
    assert line_state(step(link="tunnel-fin")) == LineState(enabled=False)
    assert line_state(step(link="flapping", every="1s"), closed=True) == LineState(enabled=False)


def test_latency_is_halved_to_each_way_and_bandwidth_is_in_whole_kilobytes() -> None:
    made = line_state(step(link="up", latency="600ms", jitter="40ms", bandwidth="9.6kbit/s"))
    attributes = {spec.name: dict(spec.attributes) for spec in made.toxics}
    assert attributes["latency_upstream"] == attributes["latency_downstream"] == {"latency": 300, "jitter": 20}
    assert attributes["bandwidth_upstream"] == {"rate": 1}


def test_a_step_is_told_in_the_words_of_the_file() -> None:
    assert step(link="up", latency="600ms", bandwidth="9.6kbit/s").label == "up, 600ms, 9.6 kbit/s"
    assert step(link="tunnel").label == "tunnel"


# ---------------------------------------------------------------------- the verdict

KEPT = verdict.Measured(
    ways=(verdict.Way("telemetry", "up", 1, 100, 100, 100, 0, 0),),
    cuts=(verdict.Cut((0.5,), (1.5,)),),
    ledger=0,
    ack_p99_s=0.01,
    latency_p99_s=0.1,
    memory_bytes=50 << 20,
    urgent_p99_s=0.05,
)


def broken(measured: verdict.Measured, **limits: object) -> set[str]:
    judged = verdict.judge(measured, Limits.model_validate(limits))
    return {each.what for each in judged if not each.kept}


def way(**counts: int) -> verdict.Measured:
    from dataclasses import replace

    return replace(KEPT, ways=(replace(KEPT.ways[0], **counts),))


def test_a_run_within_its_limits_breaks_nothing() -> None:
    assert broken(KEPT, resume_p99="1s", drain="2s", ack_p99="1s", latency_p99="1s", memory="64MiB") == set()


@pytest.mark.parametrize(
    ("measured", "what"),
    [
        (way(delivered=99), {"acknowledged and lost", "lost and not in the ledger"}),
        (way(acknowledged=99), {"not acknowledged"}),
        (way(duplicates=1), {"duplicates a cut"}),
        (way(reordered=1), {"out of order"}),
        (way(published=0, acknowledged=0, delivered=0), {"anything delivered at all"}),
    ],
)
def test_one_message_too_few_too_many_or_out_of_order_breaks_its_promise(
    measured: verdict.Measured, what: set[str]
) -> None:
    assert broken(measured) == what


def test_a_lost_message_that_the_ledger_owns_up_to_breaks_only_what_it_must() -> None:
    from dataclasses import replace

    assert broken(replace(way(delivered=99), ledger=1)) == {"acknowledged and lost"}


def test_nothing_is_promised_of_qos_0() -> None:
    assert broken(way(qos=0, acknowledged=0, delivered=50)) == set()


@pytest.mark.parametrize(
    "limits",
    [{"resume_p99": "400ms"}, {"drain": "1s"}, {"ack_p99": "5ms"}, {"urgent_p99": "40ms"}, {"memory": "49MiB"}],
)
def test_a_limit_of_time_or_memory_that_is_passed_is_broken(limits: dict[str, str]) -> None:
    assert len(broken(KEPT, **limits)) == 1


def test_a_starved_gateway_is_seen_in_the_ratio_to_the_median() -> None:
    assert verdict.slowest_ratio(verdict.Cut((), (1.0, 1.0, 1.0, 5.0))) == 5.0
    assert verdict.slowest_ratio(verdict.Cut((), (1.0, 5.0))) is None


def test_a_gateway_that_connects_again_and_again_is_seen() -> None:
    from dataclasses import replace

    limits = {"connections_per_cut": 1}
    cuts = len(KEPT.cuts)
    assert broken(replace(KEPT, connections=1 + cuts), **limits) == set()
    assert broken(replace(KEPT, connections=2 + cuts), **limits) == {"connections of a gateway a cut"}


def test_resuming_and_draining_are_timed_from_the_lines_return_for_each_gateway() -> None:
    returns, tally = Returns(), Tally(published=10)
    for number in range(6):
        tally.arrived(number)
    returns.cut()
    returns.restored(100.0, {"loco-1": [tally], "idle": [Tally()]})
    tally.arrived(6)
    returns.arrived("loco-1", 100.5)
    for number in (7, 8, 9):
        tally.arrived(number)
    returns.arrived("loco-1", 102.0)
    assert returns.cuts() == (verdict.Cut((0.5,), (2.0,)),)


def test_a_new_cut_ends_the_wait_for_what_the_last_one_left() -> None:
    returns, tally = Returns(), Tally(published=10)
    returns.cut()
    returns.restored(100.0, {"loco-1": [tally]})
    returns.cut()
    returns.arrived("loco-1", 200.0)
    assert returns.cuts() == (verdict.Cut((), ()), verdict.Cut((), ()))


def test_a_scenario_is_frozen() -> None:
    scenario: Scenario = loads(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        scenario.title = "Another"  # type: ignore[misc]
