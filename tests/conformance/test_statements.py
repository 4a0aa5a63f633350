"""The tables of normative statements: complete, and true of the tests they name.

`mqtt311.tsv` and `mqtt5.tsv` hold every numbered statement of MQTT 3.1.1 and 5.0, one a line: its id; whom it binds
(server, client, both); what it asks, in our words; and the tests that prove it (their names without `test_`), or
`client only`, `not testable: why` or `not offered: why`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXCUSE = re.compile(r"client only|not (testable|offered): .{10,}")

# How many statements each section of each standard has, so that none can be forgotten: "2.3.1": 7 is MQTT-2.3.1-1..7.
SECTIONS_311 = {
    **{"1.5.3": 3, "2.2.2": 2, "2.3.1": 7, "3.1.0": 2, "3.1.2": 24, "3.1.3": 11, "3.1.4": 5, "3.2.0": 1, "3.2.2": 6},
    **{"3.3.1": 12, "3.3.2": 3, "3.3.4": 1, "3.3.5": 2, "3.6.1": 1, "3.8.1": 1, "3.8.3": 4, "3.8.4": 6, "3.9.3": 2},
    **{"3.10.1": 1, "3.10.3": 2, "3.10.4": 6, "3.12.4": 1, "3.14.1": 1, "3.14.4": 3, "4.1.0": 2, "4.3.1": 1},
    **{"4.3.2": 2, "4.3.3": 2, "4.4.0": 1, "4.5.0": 2, "4.6.0": 6, "4.7.1": 3, "4.7.2": 1, "4.7.3": 4, "4.8.0": 2},
    **{"6.0.0": 4, "7.0.0": 2, "7.1.1": 2, "7.1.2": 2},
}
SECTIONS_5 = {
    **{"1.5.4": 3, "1.5.5": 1, "1.5.7": 1, "2.1.3": 1, "2.2.1": 6, "2.2.2": 1, "3.1.0": 2, "3.1.2": 30, "3.1.3": 12},
    **{"3.1.4": 6, "3.2.0": 2, "3.2.2": 22, "3.3.1": 13, "3.3.2": 20, "3.3.4": 10, "3.4.2": 3, "3.5.2": 3},
    **{"3.6.1": 1, "3.6.2": 3, "3.7.2": 3, "3.8.1": 1, "3.8.3": 5, "3.8.4": 8, "3.9.2": 2, "3.9.3": 2},
    **{"3.10.1": 1, "3.10.3": 2, "3.10.4": 6, "3.11.2": 2, "3.11.3": 2, "3.12.4": 1, "3.14.0": 1, "3.14.1": 1},
    **{"3.14.2": 4, "3.14.4": 3, "3.15.1": 1, "3.15.2": 3, "4.1.0": 2, "4.2": 1, "4.3.1": 1, "4.3.2": 5, "4.3.3": 13},
    **{"4.4.0": 2, "4.5.0": 2, "4.6.0": 6, "4.7.0": 1, "4.7.1": 2, "4.7.2": 1, "4.7.3": 4, "4.8.2": 6, "4.9.0": 3},
    **{"4.12.0": 7, "4.12.1": 2, "4.13.1": 1, "4.13.2": 1, "6.0.0": 4},
}
NEVER_GIVEN = {"mqtt5": {"MQTT-2.2.1-1"}, "mqtt311": set[str]()}  # numbers the standard itself leaves out


@dataclass(frozen=True, slots=True)
class Statement:
    id: str
    binds: str
    asks: str
    proof: str

    @property
    def tests(self) -> list[str]:
        return [] if EXCUSE.fullmatch(self.proof) else [f"test_{name.strip()}" for name in self.proof.split(",")]


def read(table: str) -> list[Statement]:
    lines = (HERE / f"{table}.tsv").read_text(encoding="utf-8").splitlines()
    return [Statement(*line.split("\t")) for line in lines if not line.startswith("#")]


def existing_tests() -> set[str]:
    names: list[str] = []
    for path in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names += [
            node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
    assert len(names) == len(set(names)), "two tests have one name, so the tables could mean either"
    return set(names)


tables = pytest.mark.parametrize("table", ["mqtt311", "mqtt5"])


@tables
def test_every_statement_of_the_standard_is_in_its_table_once(table: str) -> None:
    sections = SECTIONS_311 if table == "mqtt311" else SECTIONS_5
    wanted = {f"MQTT-{section}-{n + 1}" for section, count in sections.items() for n in range(count)}
    listed = [each.id for each in read(table)]
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted - NEVER_GIVEN[table]


@tables
def test_every_statement_that_binds_a_server_has_a_test_or_a_reason(table: str) -> None:
    for each in read(table):
        assert each.binds in ("server", "client", "both"), each
        assert len(each.asks) > 10, each
        assert each.proof, each
        assert each.binds == "client" or each.proof != "client only", each


@tables
def test_every_test_a_table_names_exists(table: str) -> None:
    tests = existing_tests()
    named = {name: each.id for each in read(table) for name in each.tests}
    assert {name: id for name, id in named.items() if name not in tests} == {}


def test_every_conformance_test_is_collected_by_its_name() -> None:
    """Tests written as methods or made at run time would escape the check above."""
    for path in HERE.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
