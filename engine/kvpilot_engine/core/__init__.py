"""The core process: one engine that steps, its scheduler, and the loop that serves its socket."""
