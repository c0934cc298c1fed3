"""Commit protocol, discovery and payload of checkpoints."""
