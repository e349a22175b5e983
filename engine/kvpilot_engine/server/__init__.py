"""The front process: OpenAI's API on one port, the admin API on another, metrics in Prometheus' text format.

A request's life here: read and validate the body (``schemas``), admit or shed (``front``), send it to the
core, answer in one piece or as a stream (``openai``, ``stream``), count how it ended (``metrics``).
"""
