"""Benchmarks. Each writes its figures and its command line to ``bench/results``."""
