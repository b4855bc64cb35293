"""Real services for tests: each starts on loopback, in a directory of its own, and leaves nothing behind."""
