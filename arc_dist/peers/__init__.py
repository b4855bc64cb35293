"""Copies of snapshots in the memory of other hosts: kept, sent and fetched by supervisors (docs/peer-copies.md)."""
