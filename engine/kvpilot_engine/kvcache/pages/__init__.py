"""The device pool: pages, who holds them, how they are found, and which one is evicted next."""
