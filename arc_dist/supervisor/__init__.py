"""The process beside each rank: forks trainers, sees them die within milliseconds, and starts the next generation."""
