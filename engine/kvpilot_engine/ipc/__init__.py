"""Between the front and the core: messages, framing, the front's client, spawning a core."""
