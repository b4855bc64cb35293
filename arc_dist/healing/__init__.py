"""Agreeing on a fault and acting on it, the same on every rank."""
