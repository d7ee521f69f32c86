"""Which of the newest tokens of a row stay exact."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.errors import UserError


@dataclass(frozen=True)
class Sliding:
    """The newest `size` tokens, released `flush_every` at a time once there are more.

    `counts_current=True`: a decode query sees `size` exact tokens including its own (SKVQ,
    AKVQ-VL); False: `size` and its own, the oldest is quantized after the step (KIVI's values).
    `prompt=False` keeps no prompt token in the window.
    """

    size: int
    counts_current: bool = True
    flush_every: int = 1
    prompt: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative size or an empty flush.
        """
        if self.size < 0:
            raise UserError(f"the number of recent tokens can't be negative ({self.size}).")
        if self.flush_every < 1:
            raise UserError(f"flush_every must be at least 1, not {self.flush_every}.")

    def keep(self, length: int, prompt_length: int) -> int:
        """Exact tokens of a row."""
        length -= 0 if self.prompt else prompt_length
        beyond = max(length - self.size, 0)
        return min(length, self.size) + beyond % self.flush_every


@dataclass(frozen=True)
class Residual:
    """The newest `length mod size` tokens: a buffer quantized as a whole when full (KIVI's keys).

    `prompt_block` quantizes the prompt up to a multiple of another block, with no residual
    beyond it.
    """

    size: int
    counts_current: bool = False
    prompt_block: int | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: an empty buffer.
        """
        if self.size < 1:
            raise UserError(f"the residual length must be positive, not {self.size}.")

    def keep(self, length: int, prompt_length: int) -> int:
        """Exact tokens of a row."""
        if self.prompt_block is None:
            return length % self.size
        return (length - prompt_length + prompt_length % self.prompt_block) % self.size


@dataclass(frozen=True)
class HeavyHitters:
    """A share of all tokens: the newest, and of the others those that drew most attention (H2O).

    `recent` is the share of the kept tokens that is kept for being new. A token that left never
    comes back; tokens leave after the step's attention.
    """

    ratio: float
    recent: float = 0.5
    counts_current: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a share outside [0, 1].
        """
        for name, value in (("ratio", self.ratio), ("recent", self.recent)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"the {name} of important tokens must lie in [0, 1], not {value}.")

    def keep(self, length: int, prompt_length: int) -> int:
        """Exact tokens of a row."""
        return int(self.ratio * length)

    def newest(self, length: int, prompt_length: int) -> int:
        """Those that are kept for being new: the larger half of an odd number."""
        kept = self.keep(length, prompt_length)
        return kept - int((1 - self.recent) * kept)
