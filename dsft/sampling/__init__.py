"""The plan: which documents a step trains on, from lengths alone. Touches no token and knows no rank."""
