"""The engines port: one module per runtime."""
