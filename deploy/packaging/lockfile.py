"""Reads the locks: every package by name, version and hashes, and nothing else in the file. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Pin:
    """One package. `hashes` are SHA-256, of every file that an index may offer for this version."""

    name: str
    version: str
    hashes: list[str] = field(default_factory=list)


def normal(name: str) -> str:
    """A project's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(text: str) -> list[Pin]:
    """The pins of a lock; ValueError for whatever else stands in it, as a URL, a range, an option or another hash."""
    pins: list[Pin] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].removesuffix("\\").split()
        for place, word in enumerate(words):
            if place == 0 and (pin := _PIN.fullmatch(word)):
                pins.append(Pin(normal(pin[1]), pin[2]))
            elif pins and (digest := _HASH.fullmatch(word)):
                pins[-1].hashes.append(digest[1])
            else:
                raise ValueError(f"line {number}: {word} is neither NAME==VERSION nor --hash=sha256:...")
    return pins
