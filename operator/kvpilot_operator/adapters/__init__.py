"""Implementations of the ports. Nothing is decided here."""
