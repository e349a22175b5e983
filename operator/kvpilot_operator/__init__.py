"""The operator of kvpilot: the resource, the tuning core, and the two places where it runs."""
