"""What a run found, as values, tables, pictures and a page."""
