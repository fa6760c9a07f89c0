"""Addresses of this machine itself."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
