"""Pyro models of networks with noise, and their guides."""
