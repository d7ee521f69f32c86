"""Trains `smol_llava`: `python -m kvbench.models.smol_llava.train --out FOLDER --minutes 9`.

The tower first learns alone to name what images show, then everything learns jointly to answer.
Reads nothing from the network; on one H100 fifteen minutes of joint training make the shipped
weights. `--export FOLDER` turns the parts that a run left in FOLDER into `weights.safetensors`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

START = time.monotonic()
log = logging.getLogger("kvbench.models.smol_llava")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="log, parts of at most 15 MiB, scores")
    add("--state", type=Path, help="full state for the same machine; default OUT/state")
    add("--gguf", type=Path, help="GGUF file of SmolLM2; default the installed wheel's")
    add("--base", type=Path, help="where the converted SmolLM2 is kept; default the user's cache")
    add("--minutes", type=float, default=9.0, help="wall clock of this run, everything included")
    add("--alone-seconds", type=float, default=65.0, help="of the tower alone, in a fresh run")
    add("--horizon-minutes", type=float, help="of joint training in all runs; default this run's")
    add("--reserve-seconds", type=float, default=25.0, help="for the held-out scores and saving")
    add("--resume", type=Path, help="folder with a full state or parts of an earlier run")
    add("--export", type=Path, help="write OUT/weights.safetensors from this folder and stop")
    add("--tokens", type=int, default=57344, help="of a micro-batch")
    add("--accumulate", type=int, default=1, help="micro-batches a step")
    add("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1))
    add("--held-out", type=int, default=200, help="held-out samples a task")
    add("--rate-alone", type=float, default=1e-3)
    add("--rate-vision", type=float, default=6e-4)
    add("--rate-factors", type=float, default=1.5e-3)
    add("--rank", type=int, default=40)
    add("--seed", default="0", help="of weights and training samples")
    add("--log-seconds", type=float, default=15.0)
    add("--plain", action="store_true", help="do not compile")
    add("--smoke", action="store_true", help="tiny random language model, a few steps, on the CPU")
    options = parser.parse_args(words)
    return smoke(options) if options.smoke else options


def smoke(options: argparse.Namespace) -> argparse.Namespace:
    """Sizes with which a run takes a minute on a CPU."""
    options.tokens, options.held_out, options.workers = 2048, 1, min(1, options.workers)
    options.alone_seconds, options.reserve_seconds, options.log_seconds = 4.0, 12.0, 2.0
    options.rank, options.plain = 4, True
    options.minutes = min(options.minutes, 1.0)
    return options


class Elapsed(logging.Formatter):
    """Gives every line the seconds since the start."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        record.elapsed = time.monotonic() - START
        return super().format(record)


def start_log(file: Path | None) -> None:
    """Lines with seconds since the start, on the terminal and in `file`."""
    form = Elapsed("%(elapsed)6.1f s %(message)s")
    log.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)


def main(words: list[str] | None = None) -> int:
    """Runs the command line; 2 after bad input."""
    from kvbench.errors import UserError

    options = arguments(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        start_log(None if options.export else options.out / "train.log")
        if options.export:
            return export(options.export, options.out)
        return run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()


def run(options: argparse.Namespace) -> int:
    """One training run."""
    from kvbench.models.smol_llava.session import Session

    session = Session.start(options, deadline=START + 60 * options.minutes)
    session.warm_up()
    if not options.resume:
        session.train_tower()
    session.train_jointly()
    scores = session.finish()
    (options.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return 0


def export(source: Path, target: Path) -> int:
    """Writes the shipped weights from a run's parts or full state."""
    from kvbench.models.smol_llava.session import export_weights

    path = export_weights(source, target / "weights.safetensors")
    log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
