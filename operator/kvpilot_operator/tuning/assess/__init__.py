"""Assess an observation: can it be trusted, which objectives are breached, which stage is at fault."""
