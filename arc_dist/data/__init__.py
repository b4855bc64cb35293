"""Batches that can be had again: after a rollback from memory, after a restart from the loader itself.

Import the modules by name: `source` (the position-keeping iterator), `sampler` (a seeded order), `digest`.
"""
