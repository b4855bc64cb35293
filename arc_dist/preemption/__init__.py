"""Notices that a job is to leave: signals, a file, a word from the supervisor; and what is known of saving in time."""
