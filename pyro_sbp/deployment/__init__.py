"""A pruned network outside of training: saved, exported, measured."""
