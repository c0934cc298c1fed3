"""Setup, loop, step, schedule."""
