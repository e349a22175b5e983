"""Open-loop traffic for an OpenAI-compatible server: scripted chats or a recorded trace."""
