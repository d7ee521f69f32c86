"""Statistics of a text's own held-out windows, for the methods that need some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbench.evaluation.calibration import (
    calibrated,
    keep_statistics,
    kept_statistics,
    lacking,
    statistics_for,
    statistics_of_text,
)

if TYPE_CHECKING:
    from kvbench.cache import Calibration
    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.text import Text, Windows
    from kvbench.models.load import LoadedModel
    from kvbench.perplexity.request import PerplexityRequest


def calibration(
    request: PerplexityRequest,
    loaded: LoadedModel,
    text: Text,
    windows: Windows,
    progress: Progress,
) -> Calibration | None:
    """Statistics made once and kept beside the rows; None if no method of the request asks.

    Raises:
        UserError: the file of an earlier run can't be read or belongs to another model.
    """
    needing = calibrated(request.methods)
    names = statistics_for(needing)
    if not names:
        return None
    made_on = f"{text.sha256[:12]}-{request.window}"
    file = f"{loaded.entry.name}-{loaded.revision[:12]}-{made_on}.safetensors"
    path = request.out / "calibration" / file
    if missing := lacking(path, names):
        progress.note(
            f"calibrating {loaded.entry.name} for {', '.join(needing)} on the last "
            f"{len(windows.held_out)} windows of {text.name}, which are not scored"
        )
        keep_statistics(statistics_of_text(loaded, missing, text, windows.held_out), path)
    return kept_statistics(path, loaded, names)
