"""`python -m pyro_sbp.cli`, for programs that start a module, such as torchrun."""

from pyro_sbp.cli import main

main()
