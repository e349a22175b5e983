"""The model: load weights, run one step of a batch, attention over pages, determinism."""
