"""Streams, cursors and the journal that holds them. Knows no network, no asyncio and no configuration file."""
