"""The progress of training on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pyro_sbp.training.progress import Progress

__all__ = ["ProgressBar"]


class ProgressBar:
    """Prints a title when the training begins, then a progress bar on a terminal, or else one line
    per epoch."""

    def __init__(self, quiet: bool, title: str) -> None:
        self.quiet, self.title = quiet, title
        self.live = not quiet and sys.stderr.isatty()
        self.bar: Any = None
        self.key: tuple[str, int] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def update(self, progress: Progress) -> None:
        """Show the progress, which `train` passes to its argument `watch`."""
        if self.quiet:
            return
        if self.title:
            click.echo(self.title, err=True)
            self.title = ""
        title = f"{progress.phase} {progress.epoch}/{progress.epochs}"
        if self.live:
            self._draw(progress, f"{title:>16}")
        elif progress.error is not None:
            click.echo(f"{title:>16}  {_in_words(progress)}", err=True)

    def _draw(self, progress: Progress, title: str) -> None:
        from tqdm import tqdm

        if self.key != (progress.phase, progress.epoch):
            self._close()
            self.bar = tqdm(total=progress.steps, desc=title, ncols=0, unit="step")
            self.key = (progress.phase, progress.epoch)
        self.bar.n = progress.step
        self.bar.set_postfix_str(_in_words(progress))

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _in_words(progress: Progress) -> str:
    """The losses; after an epoch, also the error and the units that remain."""
    text = f"loss {progress.loss:.4f} (nll {progress.nll:.4f}"
    text += f" + weighted kl {progress.weighted_kl:.4f})"
    standing = progress.standing
    if progress.error is None or standing is None:
        return text
    left = "-".join(str(count) for count in standing.units.values())
    text += f"  error {progress.error:.2f} %  units {left}"
    if standing.macs is not None:
        text += f"  expected MACs {standing.macs:,.0f}"
    if standing.held:
        text += f"  (all under the threshold: {', '.join(standing.held)})"
    return text
