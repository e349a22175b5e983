"""HTTP over one session: OpenAI's API and the metrics on one port, the admin API on another.

``schemas`` validates a body, ``openai`` and ``stream`` answer it, ``errors`` gives every error one shape.
"""
