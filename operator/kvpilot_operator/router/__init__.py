"""HTTP router of local mode: one port for all replicas of a deployment."""
