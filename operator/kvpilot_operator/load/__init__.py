"""Traffic for an OpenAI-compatible server: scripted chats or a recorded trace, open loop."""
