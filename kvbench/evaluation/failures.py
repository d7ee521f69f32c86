"""What a method raised while it ran: the status of a row, and one sentence when all is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from kvbench.errors import Mistake, UserError, fault
from kvbench.evaluation.hardware import is_out_of_memory


def failure(error: Exception) -> tuple[Literal["oom", "error"], str]:
    """Status and text of the row of a method that raised `error`.

    Raises:
        UserError: `error` itself, if it is one: it is the user's to act on before anything goes on.
    """
    if isinstance(error, UserError):
        raise error
    if is_out_of_memory(error):
        return "oom", (str(error).splitlines() or [type(error).__name__])[0]
    return "error", fault(error)


def check_faults(raised: Iterable[tuple[str, str]]) -> None:
    """Say which methods' code raised something, of pairs of a method and its row's text.

    Raises:
        Mistake: any did.
    """
    faults: dict[str, list[str]] = {}
    for method, text in raised:
        faults.setdefault(method, []).append(text)
    told = "; ".join(
        f"{method} failed {'once' if len(texts) == 1 else f'{len(texts)} times'} ({texts[0]})"
        for method, texts in faults.items()
    )
    if told:
        raise Mistake(
            f"{told}: repair what is named there, and the same command runs only what is missing"
        )
