"""A task whose data lie in MileBench's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvbench.tasks.base import Prompt, Sample, Score, Task, TaskData, Tokens
from kvbench.tasks.milebench.prompt import build_prompt
from kvbench.tasks.milebench.reader import read_task
from kvbench.tasks.milebench.scoring import score

# The official code gives this set's 26 and more options no letters.
_UNLETTERED = "GPR1200"


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

    def score(self, sample: Sample, answer: str) -> Score:
        """See `scoring.score`."""
        return score(sample, answer, self.folder)
