"""``python -m kvbench`` and the ``kvbench`` script."""

from __future__ import annotations

from kvbench.cli import app


def main() -> None:
    """Run the command line; exits with 0, 2 on bad input, 130 when interrupted."""
    app(prog_name="kvbench")


if __name__ == "__main__":
    main()
