"""The resource's model, pure: what a user writes, what it resolves to, and what its status says."""
