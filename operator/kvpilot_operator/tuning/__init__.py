"""The pure tuning core: no client, no clock, no I/O."""
