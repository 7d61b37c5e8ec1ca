"""Save, export and measure pruned networks."""
