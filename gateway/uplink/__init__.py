"""The way to the hub: link state and drain without I/O, then a thin driver."""
