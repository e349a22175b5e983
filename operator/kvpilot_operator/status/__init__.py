"""The status of a resource: its model, its texts, its Events, and the tuner state that it carries."""
