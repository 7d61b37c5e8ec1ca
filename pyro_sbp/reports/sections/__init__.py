"""The sections of the page about runs, as parts in HTML."""
