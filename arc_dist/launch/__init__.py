"""Ways to start: `python -m arc_dist`, `arcrun`. Command lines, environment, exit codes; nothing else."""
