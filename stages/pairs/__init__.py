"""`pairs`: noise and what the deterministic teacher makes of it."""
