"""A task whose data lie in MileBench's layout."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kvbench.errors import UserError
from kvbench.tasks.base import Prompt, Sample, Score, Task, TaskData, Tokens
from kvbench.tasks.milebench.prompt import build_prompt, newline_rule
from kvbench.tasks.milebench.reader import read_task
from kvbench.tasks.milebench.scoring import score

# The official code gives this set's 26 and more options no letters.
_UNLETTERED = "GPR1200"
_GENERATORS = {"milebench": "kvbench.tasks.minimile", "easy_vqa": "kvbench.tasks.easy_vqa"}
_SPLITS = ("milebench",)  # the suites whose generator also draws a calibration split


@dataclass(frozen=True)
class MileBenchTask(Task):
    """Reads, prompts and scores by MileBench's official rules."""

    def load(self, root: Path) -> TaskData:
        """See `reader.read_task`."""
        return read_task(root, self.folder)

    def prompt(
        self, sample: Sample, tokenizer: Tokens, max_context_len: int, tokens_per_image: int
    ) -> Prompt:
        """See `prompt.build_prompt`."""
        lettered = self.folder != _UNLETTERED
        return build_prompt(sample, tokenizer, max_context_len, tokens_per_image, lettered)

    def user_turn(self, prompt: Prompt) -> str:
        """See `prompt.newline_rule`."""
        return newline_rule(prompt.text)

    def default_root(self) -> Path:
        """The generated set of this suite.

        Raises:
            UserError: no set is generated for it, or it can't be written here.
        """
        if self.suite not in _GENERATORS:
            raise UserError(
                f"task {self.name} brings no data: name its folder with --data-root, or define "
                "default_root"
            )
        root: Path = import_module(_GENERATORS[self.suite]).default_root()
        return root

    def calibration_root(self, samples: int) -> Path:
        """The split of the generated set that nobody scores; see `Task.calibration_root`."""
        if self.suite not in _SPLITS:
            return super().calibration_root(samples)
        root: Path = import_module(_GENERATORS[self.suite]).calibration_root(samples)
        return root

    def score(self, sample: Sample, answer: str) -> Score:
        """See `scoring.score`."""
        return score(sample, answer, self.folder)
