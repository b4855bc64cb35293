"""A whole job in one process under a seeded scheduler: the coordinator's own code, on a machine that is only played.

`simulation.simulate` plays one job; `exhaustive.explore` visits every state of a very small one. What may go wrong is
listed in `faults`, and docs/faults.md says in words what each fault is.
"""
