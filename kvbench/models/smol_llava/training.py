"""The two training loops: the vision tower alone, then everything together.

Both run by the clock: learning rates and the task mixture follow elapsed time, so a run ends when
it was told to, whatever the machine's speed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvbench.models.smol_llava import objectives
from kvbench.models.smol_llava.batches import ATTRIBUTES, Batch, Dials
from kvbench.models.smol_llava.checkpoint import Progress
from kvbench.models.smol_llava.examples import FOLDERS
from kvbench.models.smol_llava.layers import Functions
from kvbench.models.smol_llava.network import Network
from kvbench.models.smol_llava.schedule import Skills, further_share, rate, task_weights

FACTS_JOINTLY = 0.1
CLIP = 1.0
log = logging.getLogger(__name__)


class Trainee(nn.Module):
    """Everything that is trained: the network and the heads that only training needs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.heads = objectives.FactHeads()

    def optimizer(self, rates: Rates) -> torch.optim.AdamW:
        """AdamW with one rate for the factors and one for everything that sees."""
        seeing = [
            *self.network.tower.parameters(),
            *self.network.projector.parameters(),
            *self.heads.parameters(),
        ]
        groups = [
            {"params": seeing, "base": rates.vision},
            {"params": list(self.network.factors.parameters()), "base": rates.factors},
        ]
        fused = seeing[0].is_cuda
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)


@dataclass(frozen=True)
class Rates:
    """Full learning rates: of the tower alone, of the tower jointly, of the factors."""

    alone: float = 1e-3
    vision: float = 6e-4
    factors: float = 1.5e-3


class Source:
    """Training batches on the device; held-out ones are set aside on the way.

    Attributes:
        held_out: batches for evaluation that were met so far, on the CPU.
        waited: seconds spent waiting for workers.
    """

    def __init__(self, stream: Iterator[Batch], device: torch.device) -> None:
        self.stream, self.device = stream, device
        self.held_out: list[Batch] = []
        self.waited = 0.0

    def next(self) -> Batch:
        """The next training batch."""
        start = time.monotonic()
        while (batch := next(self.stream)).held_out:
            self.held_out.append(batch)
        self.waited += time.monotonic() - start
        return batch.to(self.device)


def resilient(network: Network, step: Callable[[], Tensor]) -> Tensor:
    """Runs a step; a failing compiler is replaced by plain functions, a full memory by recomputing.

    Raises:
        RuntimeError: it fails even so.
    """
    for _ in range(2):
        try:
            return step()
        except torch.OutOfMemoryError:
            if network.functions.recompute:
                raise
            log.warning("out of memory: layers are recomputed in the backward pass from here")
            network.functions.recompute = True
        except Exception as error:  # the compiler may raise anything
            if network.functions.before is Functions().before:
                raise
            log.warning("compiling failed, plain functions from here: %.800r", error)
            network.functions = Functions(recompute=network.functions.recompute)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return step()


def alone_step(trainee: Trainee, batch: Batch, words: Tensor) -> tuple[Tensor, Tensor]:
    """Backward pass of the facts alone; loss and hits (attributes, 2)."""
    tokens, features = trainee.network.image_features(batch.pixels)
    pooling, logits = trainee.heads(tokens)
    loss = objectives.fact_loss(logits, batch.facts) + objectives.alignment_loss(
        pooling, features, words, trainee.heads.valid, batch.facts
    )
    loss.backward()
    return loss.detach(), objectives.fact_hits(logits.detach(), batch.facts)


def joint_step(trainee: Trainee, batch: Batch, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Backward pass of answers and facts; loss of the answers and hits (tasks, 3).

    Args:
        trainee: gets gradients.
        batch: on the trainee's device.
        share: what the loss is multiplied by, where several batches make one step.
    """
    logits, tokens = trainee.network(batch)
    loss = objectives.answer_loss(logits, batch)
    facts = objectives.fact_loss(trainee.heads(tokens)[1], batch.facts)
    whole = share * (loss + FACTS_JOINTLY * facts)
    whole.backward()
    return loss.detach(), objectives.letter_hits(logits.detach(), batch)


class Pace:
    """Keeps the host at most one step ahead of the device, so that its clock means something."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def step(self, loss: Tensor) -> None:
        """Waits for the step before the one that made `loss`."""
        if self.previous is not None:
            self.previous.item()
        self.previous = loss


def train_alone(
    trainee: Trainee, source: Source, words: Tensor, seconds: float, rates: Rates, every: float
) -> None:
    """Trains tower and projector to name each image's facts.

    Args:
        trainee: only its tower, projector and heads change.
        source: of batches; only their images are used.
        words: of `objectives.word_vectors`.
        seconds: of wall clock.
        rates: full learning rates.
        every: seconds between two lines of the log.
    """
    parameters = [
        *trainee.network.tower.parameters(),
        *trainee.network.projector.parameters(),
        *trainee.heads.parameters(),
    ]
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    start = told = time.monotonic()
    pace, hits, steps = Pace(), torch.zeros(len(ATTRIBUTES), 2, device=words.device), 0
    while (elapsed := time.monotonic() - start) < seconds or steps == 0:
        optimizer.param_groups[0]["lr"] = rates.alone * max(0.05, rate(elapsed / seconds))
        loss, found = alone_step(trainee, source.next(), words)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pace.step(loss)
        hits, steps = hits + found, steps + 1
        if time.monotonic() - told > every:
            _tell_facts("tower", steps, elapsed, loss, hits, source)
            told, hits = time.monotonic(), torch.zeros_like(hits)
    _tell_facts("tower, last", steps, seconds, loss, hits, source)
    match_norm(trainee.network, source.next())


@torch.no_grad()
def match_norm(network: Network, batch: Batch) -> None:
    """Scales the projector so that its tokens are as long as the language model's embeddings.

    Alignment looks at directions only, so it leaves the length to chance.
    """
    _, features = network.image_features(batch.pixels[:64])
    wanted = network.language.embedding.float().norm(dim=-1).median()
    factor = wanted / features.float().norm(dim=-1).median()
    network.projector.linear_2.weight.mul_(factor)
    network.projector.linear_2.bias.mul_(factor)
    log.info("projected tokens scaled by %.2f", factor.item())


def _tell_facts(
    name: str, steps: int, elapsed: float, loss: Tensor, hits: Tensor, source: Source
) -> None:
    shares = {
        attribute: round(100 * right / told)
        for attribute, (right, told) in zip(ATTRIBUTES, hits.tolist(), strict=True)
        if told
    }
    log.info(
        "%s: step %d, %.0f s, %.1f steps/s, loss %.3f, waited %.1f s, percent right %s",
        name, steps, elapsed, steps / max(elapsed, 1e-9), loss.item(), source.waited, shares,
    )  # fmt: skip


@dataclass
class Joint:
    """Joint training of everything.

    Attributes:
        trainee: what is trained.
        source: of batches.
        dials: of the workers.
        optimizer: of `Trainee.optimizer`; every group has its full rate as "base".
        progress: continued from earlier runs.
        horizon: seconds of joint training in all runs together.
        accumulate: batches a step.
        every: seconds between two lines of the log.
        save: called now and then to save the state.
        save_every: seconds between two calls.
    """

    trainee: Trainee
    source: Source
    dials: Dials
    optimizer: torch.optim.Optimizer
    progress: Progress
    horizon: float
    accumulate: int
    every: float
    save: Callable[[], None]
    save_every: float = 180.0

    def run(self, seconds: float, steps: int | None = None) -> None:
        """Trains for `seconds` of wall clock, or `steps` if they take less; one step at least."""
        self.skills = Skills(len(FOLDERS))
        self.hits = torch.zeros(len(FOLDERS), 3, device=self.source.device)
        self.recent = torch.zeros(len(FOLDERS), 3)
        before, start = self.progress.seconds, time.monotonic()
        told = turned = saved = start
        first, pace = self.progress.steps, Pace()
        self.told_at = (start, self.progress.samples)
        while (now := time.monotonic()) - start < seconds or self.progress.steps == first:
            self.progress.seconds = before + now - start
            fresh = min(1.0, (now - start) / 5)  # a restarted optimizer needs a warm-up of its own
            loss, norm = self._step(min(1.0, self.progress.seconds / self.horizon), fresh)
            pace.step(loss)
            if now - turned > min(5.0, self.every):
                turned = now
                self._turn_dials()
            if now - told > self.every:
                told = now
                self._tell(loss, norm)
            if now - saved > self.save_every:
                saved = now
                self.save()
            if steps is not None and self.progress.steps - first >= steps:
                break
        self._turn_dials()
        self._tell(loss, norm)

    def _step(self, progress: float, fresh: float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(progress) * fresh
        for _ in range(self.accumulate):
            batch = self.source.next()
            self.progress.samples += batch.tasks.shape[0]
            loss, hits = joint_step(self.trainee, batch, 1 / self.accumulate)
            self.hits = self.hits + hits
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.steps += 1
        return loss, norm

    def _turn_dials(self) -> None:
        """Measures skills since the last time and lets workers draw accordingly."""
        hits = self.hits.cpu()
        self.skills.update(hits)
        self.recent, self.hits = self.recent + hits, torch.zeros_like(self.hits)
        self.dials.tasks.copy_(task_weights(self.skills.value))
        self.dials.further.fill_(further_share(self.progress.seconds / self.horizon))

    def _tell(self, loss: Tensor, norm: Tensor) -> None:
        now, (then, samples) = time.monotonic(), self.told_at
        self.told_at = (now, self.progress.samples)
        shares = {
            folder: round(100 * right / seen)
            for folder, (right, seen, _) in zip(FOLDERS, self.recent.tolist(), strict=True)
            if seen
        }
        self.recent = torch.zeros_like(self.recent)
        log.info(
            "joint: step %d, %.0f s, %d samples, %.0f samples/s, loss %.3f, norm %.2f, rate %.1e, "
            "waited %.1f s, further %.2f, percent right %s",
            self.progress.steps, self.progress.seconds, self.progress.samples,
            (self.progress.samples - samples) / max(now - then, 1e-9), loss.item(), norm.item(),
            self.optimizer.param_groups[1]["lr"], self.source.waited,
            self.dials.further.item(), shares,
        )  # fmt: skip
