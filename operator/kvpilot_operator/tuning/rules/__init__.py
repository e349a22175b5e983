"""Rules: what each one cures, within which bounds, and what it predicts."""
