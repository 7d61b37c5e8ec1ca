"""Structured Bayesian pruning inside the training loops of other libraries."""
