"""Training state held in memory: what it is made of, and the ring of slots that outlives the training process.

Import the modules by name. `layout` needs the standard library alone, so that a supervisor can read what a training
process left behind without touching a tensor; importing this package therefore imports nothing.
"""
