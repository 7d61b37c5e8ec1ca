"""From a posterior to a smaller network that is checked."""
