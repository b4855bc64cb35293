"""Checkpoints as bytes and manifests: written whole or not at all, verified before use, readable by stock torch."""
