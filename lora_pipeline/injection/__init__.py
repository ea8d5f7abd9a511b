"""Adapters inside live modules: injected layers and placeholder tokens."""
