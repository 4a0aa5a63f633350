"""AMQP 1.0: SASL, messages and proton's engine without I/O, then a thin listener."""
