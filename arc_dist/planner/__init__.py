"""What goodput a job may expect: a seeded model of its faults, copies and restarts; `arc simulate` asks it.

==================  ===================================================================================
`units`             "5y", "2TB", "10GB/s" and back
`model`             copies, faults and plans, and the account of one life of a job
`faults`            when faults strike: a seeded trace that every plan is played against
`closed_form`       Young's and Daly's intervals, and Daly's efficiency
`search`            the intervals with the best goodput, by simulation
`cluster`           from what a user knows of a cluster to the plans of arc-dist and of plain torchrun
`forecast`          plans, search and lives put together into one answer
`options`           the command line's options with their defaults and sources
`report`, `svg`     the answer as text with plots, and as a picture
==================  ===================================================================================

Everything but `commands` is pure: no clock, no files; all randomness comes from a seed.
"""
