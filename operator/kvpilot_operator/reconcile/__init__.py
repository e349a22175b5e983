"""Reconciling one resource, and the queue that says which resource is next."""
