"""Checkpoints to Hugging Face folders."""
