"""easy-VQA: third-party images and questions, several images a prompt."""

from __future__ import annotations

from kvbench.tasks.easy_vqa.drawing import FOLDER, INSTRUCTIONS, draw
from kvbench.tasks.easy_vqa.writer import VERSION, default_root, make

__all__ = ["FOLDER", "INSTRUCTIONS", "VERSION", "default_root", "draw", "make"]
