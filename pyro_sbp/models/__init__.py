"""Pyro models and guides of networks with noise."""
