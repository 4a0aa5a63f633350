"""What is wrong with a configuration file, told so that the reader can mend it: line, key, found, expected, write.

As values: `config_report` makes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import ConfigError

SECRET_KEY = re.compile(r"pass|secret|token", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what stands there, what should, and what to write instead."""

    file: str
    line: int
    key: str
    found: str
    expected: str
    write: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        what = f"{self.key}: " if self.key else ""
        found = f"found {self.found}, " if self.found else ""
        write = f"; write {self.write}" if self.write else ""
        return f"{where}{what}{found}expected {self.expected}{write}"


class ConfigErrors(ConfigError):
    """Everything that is wrong with one configuration file, in the order of its lines."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def syntax_problem(file: str, text: str, message: str) -> Problem:
    """What `tomllib` said, which names the line in words."""
    match = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    lines = text.splitlines() or [""]
    line = int(match[1]) if match and match[1] else len(lines)
    what = message[: match.start()] if match else message
    here = lines[line - 1].strip() if line <= len(lines) else ""
    if SECRET_KEY.search(here):
        here = here.split("=")[0].strip()
    return Problem(file, line, "", json.dumps(here[:80], ensure_ascii=False), f"valid TOML ({what})", "")
