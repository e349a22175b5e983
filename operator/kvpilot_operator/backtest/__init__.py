"""The real reconciler against simulated engines: what the tuner would do under a load, in seconds."""
