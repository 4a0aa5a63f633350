"""The daemon: composes the journal, the protocols and the configuration. The only package with sockets."""

__version__ = "0.1.0"
