"""What the tests of the command line have in common."""

from click.testing import CliRunner

from pyro_sbp.cli import cli


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)


class StopAfter:
    """Asks to stop after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self):
        self.steps -= 1
        return self.steps <= 0
