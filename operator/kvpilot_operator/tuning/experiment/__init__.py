"""Experiments: the canary, its evidence, the verdict, and the emergency that needs none."""
