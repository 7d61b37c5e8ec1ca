"""A survey of the networks of several libraries: gates, exactness of cuts, and what remains.

`python -m pyro_sbp.experiments.survey COLLECTION [NAME ...]` writes a record of a collection into
`experiments/results/survey/`, from which `pyro_sbp.experiments.tables` makes tables.
"""
