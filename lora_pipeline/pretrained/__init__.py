"""Bases: the only room that knows diffusers and transformers."""
