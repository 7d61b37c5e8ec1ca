"""Training runs: from a request to a run directory."""
