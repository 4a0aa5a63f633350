"""The errors of the daemon, named by who must act. Knows nothing of what raises them."""

from __future__ import annotations


class LinesideError(Exception):
    """Anything Lineside reports in one line to the person who asked."""


class ConfigError(LinesideError):
    """The operator must act: the configuration cannot be used."""


class PeerError(LinesideError):
    """A peer broke its protocol: its connection is closed, nothing else."""
