"""Runs: a request in, a run directory out."""
