"""Held-out loss and generation metrics."""
