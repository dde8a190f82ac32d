"""Serving cores: the protocol, the registry, and the adapters to real schedulers."""
