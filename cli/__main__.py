"""`python -m pyro_sbp.cli`, for programs such as torchrun that start a module."""

from pyro_sbp.cli import main

main()
