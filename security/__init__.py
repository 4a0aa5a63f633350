"""TLS contexts, identities and credentials. Values in, values out: opens no socket, keeps no state."""
