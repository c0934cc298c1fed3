"""Which processes were started, and the checks at the start."""
