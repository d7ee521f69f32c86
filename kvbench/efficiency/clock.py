"""When things were done on the device, without waiting for it between them."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks moments on a device's own timeline: work goes on while they are noted."""

    def __init__(self, device: torch.device) -> None:
        """Not yet started."""
        self._device = device
        self._marks: list[Any] = []
        self._began = 0.0

    def start(self) -> None:
        """Begin, with nothing under way on the device."""
        self._synchronize()
        self._began = time.perf_counter()
        self._marks.clear()
        self.mark()

    def mark(self) -> None:
        """Note the moment at which all that was asked of the device so far is done."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def times(self, prompts: int) -> dict[str, Any]:
        """A result's times in seconds, by name, once the device is done.

        Args:
            prompts: How many of the marks end a micro-batch of prompts; the others end steps.
        """
        self._synchronize()
        total, spent = time.perf_counter() - self._began, self._between()
        prefill = sum(spent[:prompts])
        return {
            "prompts_s": tuple(spent[:prompts]),
            "ttft_s": prefill,
            "tpot_s": tuple(spent[prompts:]),
            "decode_s": total - prefill,
            "total_s": total,
        }

    def _between(self) -> list[float]:
        """Seconds from each mark to the next; the first is the start."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
