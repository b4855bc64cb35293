"""The rules of arc-dist, as pure functions: (state, event) -> (state', actions, reason).

Nothing here reads a clock, a file, the environment or a random number; `now_s` is an argument. The same state and the
same event always give the same answer, on every rank, in a test and in a simulation. What acts on the answers lives
above: the loop in the rank, the supervisor beside it, the coordinator's service.

===================  ==================================================================================
`flags`, `healing`   a rank's ballot, the vote, and the ladder of actions inside a generation
`ladder`             the policy that the ladder follows
`generations`        the life of a job: which processes may run, when they must end, when the job is over
`job`, `events`      its state, and the vocabulary of what is heard and done
`budgets`            why a generation ended, who is to blame, and whether another attempt is worth while
`pick`               the step that all ranks restore, and where each rank finds it
`commit`             when a set of shards becomes a checkpoint
===================  ==================================================================================
"""
