"""The results of a run, as values, tables, figures and an HTML page."""
