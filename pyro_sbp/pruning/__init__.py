"""Choose units by their posterior, build the smaller network, and verify it."""
