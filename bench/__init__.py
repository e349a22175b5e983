"""Benchmarks. Each writes its figures and the command that made them to ``bench/results``."""
