"""MQTT 3.1.1 and 5.0: codec and server connection without I/O, then a thin listener."""
