"""MileBench as lm-eval tasks: a group `milebench` of twelve, defined by the YAML files here.

Any model class of lm-eval that takes images can run them:
`lm_eval --include_path <this folder> --tasks milebench --metadata '{"data_root": "..."}' ...`
"""

from __future__ import annotations

from pathlib import Path

INCLUDE_PATH = Path(__file__).resolve().parent
"""What to pass to lm-eval as its include path."""
