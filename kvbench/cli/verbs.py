"""From exceptions to exit codes: bad input is one line on stderr, never a traceback."""

from __future__ import annotations

import errno
from typing import Any

import typer
from typer.core import TyperGroup

from kvbench.errors import UserError

BAD_INPUT = 2
INTERRUPTED = 130
# What the user's disk or paths can do to any verb; other system errors are faults of the program.
_OUTSIDE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class Verbs(TyperGroup):
    """A group of commands in which `UserError` exits with 2 and Ctrl-C with 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen verb."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno not in _OUTSIDE:
                raise
            _fail(f"can't use {error.filename or 'the disk'}: {error.strerror}")


def _fail(message: str) -> None:
    typer.echo(f"kvbench: {message}", err=True)
    raise typer.Exit(BAD_INPUT)
