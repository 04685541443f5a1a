"""What a fit says while it runs."""

from __future__ import annotations

import contextlib
import sys

from scvi_core.log import log


def bar(progress: bool, total: int, done: int):
    """A progress bar on a terminal; a line an epoch in ten otherwise, so that log files stay short."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def shown():
        text = "ELBO {:.1f}  validation {:.1f}  {:,.0f} cells/s"
        if not progress:
            yield lambda *_: None
        elif not sys.stderr.isatty():
            epoch = done

            def line(train_elbo: float, validation_elbo: float, rate: float) -> None:
                nonlocal epoch
                epoch += 1
                if epoch % max(1, total // 10) == 0 or epoch == total:
                    log.info("epoch %d/%d  %s", epoch, total, text.format(train_elbo, validation_elbo, rate))

            yield line
        else:
            from rich.console import Console

            columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
                task = bars.add_task("", total=total, completed=done)
                yield lambda *values: bars.update(task, advance=1, description=text.format(*values))

    return shown()
