"""The operator of kvpilot: the resource, the tuning core, and the two places it runs (a cluster, one machine)."""
