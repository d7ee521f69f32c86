"""lm-eval's models `kvbench-vlm` and `kvbench-lm`: any method's cache underneath its tasks."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from rich.progress import track
from torch import Tensor

from kvbench.cache import QuantizedCache, cache_argument
from kvbench.defaults import REFERENCE
from kvbench.errors import Mistake, UserError
from kvbench.evaluation.calibration import calibrated, kept_statistics, statistics_for
from kvbench.evaluation.choices import choose_methods
from kvbench.evaluation.decode import Usage, peer_usage, prefill, without_last
from kvbench.evaluation.failures import failure
from kvbench.evaluation.hardware import load
from kvbench.evaluation.runner import PreparedMethod
from kvbench.evaluation.samples import ask
from kvbench.models.find import find_model
from kvbench.models.inputs import ModelInputs, encode, image_id
from kvbench.models.load import LoadedModel
from kvbench.registry import TASKS
from kvbench.tasks.base import Sample
from kvbench.tasks.images import open_image

if TYPE_CHECKING:
    from transformers import Cache

    from kvbench.evaluation.progress import Progress

PromptStyles = Literal["chat", "official"]
_LM_EVAL_DEVICE = "cuda:0"  # what lm-eval asks for when the user doesn't

_log = logging.getLogger(__name__)
_Parent: Any = object  # stands for the class of lm-eval that comes next


class _FromCache(_Parent):  # type: ignore[misc]
    """Answers requests from a method's cache, one at a time; goes before a class of lm-eval.

    Args:
        pretrained: Alias, `alias=/folder` or a folder, as `kvbench eval --models` takes them; or a
            model that is loaded already, to try several methods on it; None: a bundled one.
        kv_method: Method with parameters, as `akvq_vl[recent=64]`; or one made for this model.
        protocol: `quantized_prefill`, `exact_prefill` or `sparse_prefill`.
        calibration: File of `kvbench calibrate`, for methods that need statistics.
        device: As lm-eval passes it; its default and None are CUDA if there is any.
        dtype: Type of weights; `auto` is the zoo's.
        batch_size: 1.
        **options: Further arguments of lm-eval's class.

    Raises:
        UserError: The model, the method, the protocol or an option can't be used.
    """

    bundled: str
    """The model that answers when none is given."""

    def __init__(
        self,
        pretrained: str | LoadedModel | None = None,
        kv_method: str | PreparedMethod = REFERENCE,
        protocol: str = "quantized_prefill",
        calibration: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if str(batch_size) != "1":
            raise UserError(f"batch_size is {batch_size}: kvbench answers one at a time, use 1")
        device = "auto" if device in (None, _LM_EVAL_DEVICE) else device
        self._loaded = _loaded(pretrained or self.bundled, str(device), dtype)
        if isinstance(kv_method, str):
            kv_method = _prepared(self._loaded, kv_method, protocol, calibration)
        self._method = kv_method
        self.out_of_memory: list[str] = []
        """Requests without an answer, as `task/document`; lm-eval scores them as empty answers."""
        self.usages: dict[str, Usage] = {}
        """What each request took in the cache and read of it, by `task/document`."""
        self.progress: Progress | None = None
        """Who listens instead of a bar of our own."""
        self._cache: Cache | None = None
        super().__init__(self._loaded.model, batch_size=1, **self._fitted(options))

    def _fitted(self, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of lm-eval's constructor for the model that was loaded."""
        return options

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests one after the other; one that runs out of memory gets an empty answer.

        Raises:
            UserError: An image can't be read, or a prompt is longer than the model.
            Mistake: The method's code raises something.
        """
        shown = track(requests, "Requests", disable=disable_tqdm or self.progress is not None)
        # The parent collects garbage at every request; the model need not be searched each time.
        gc.freeze()
        try:
            return [self._answer(request) for request in shown]
        finally:
            gc.unfreeze()

    def loglikelihood(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse: one pass over prompt and answer reads no stored state."""
        raise UserError(
            "kvbench answers generate_until requests only: a log-likelihood is one pass over "
            "prompt and answer that never reads a stored cache, so every method would look lossless"
        )

    loglikelihood_rolling = loglikelihood

    def set_cache_hook(self, cache_hook: Any) -> NoReturn:
        """Refuse lm-eval's response cache: its keys know nothing of the method."""
        raise UserError(
            "kvbench can't be used with --use_cache: lm-eval's response cache doesn't tell "
            "methods apart and would give one method's answers as another's"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results, with the method and requests without an answer."""
        ours = {
            "model": self._loaded.entry.name,
            "revision": self._loaded.revision,
            "method": self._method.spec,
            "protocol": self._method.protocol,
            "prompt_style": "chat",
            "calibration": self._method.calibration,
            "out_of_memory": list(self.out_of_memory),
        }
        return {**super().get_model_info(), "kvbench": ours}

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Text alone."""
        fed = self._with_cache({"input_ids": context, **options})
        out: Tensor = super()._model_generate(fed.pop("input_ids"), max_length, stop, **fed)
        return out

    def _answer(self, request: Instance) -> str:
        where = f"{request.task_name}/{request.doc_id}"
        try:
            answers: list[str] = super().generate_until([self._opened(request)], disable_tqdm=True)
        except Exception as error:
            status, reason = failure(error)
            if status == "error":
                if self._method.is_reference:
                    raise
                raise Mistake(f"{self._method.spec} failed at {where} ({reason})") from error
            _log.warning("%s ran out of memory and counts as an empty answer: %s", where, error)
            self.out_of_memory.append(where)
            return ""
        else:
            self._note_usage(where)
            return answers[0]
        finally:
            self._cache = None
            if self.progress is not None:
                self.progress.advance()

    def _note_usage(self, where: str) -> None:
        """Remember what the answer's cache held and how much of it was read as stored."""
        cache, peer = self._cache, self._method.peer
        if isinstance(cache, QuantizedCache):
            row = cache.rows()[0]
            used = Usage(row.nbytes, row.bits_per_element, row.packed_tokens_read)
        elif cache is not None and peer is not None:
            used = peer_usage(self.model, peer.nbytes(cache), 1, cache.get_seq_length())
        else:
            return
        self.usages[where] = used

    def _opened(self, request: Instance) -> Instance:
        """The request as lm-eval's class wants it."""
        return request

    def _check_length(self, tokens: int, room: int, hint: str) -> None:
        """Refuse a prompt that would be cut: what is left is another question."""
        if tokens > room:
            raise UserError(
                f"a prompt has {tokens} tokens, but {self._loaded.entry.name} reads {room}: {hint}"
            )

    def _with_cache(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` with a fresh cache, ahead of which a peer stores the prompt."""
        cache, peer = self._method.new_cache(self.model), self._method.peer
        ids = inputs["input_ids"]
        if peer is not None and peer.splits_prompt and ids.shape[1] > 1:
            images = {name: inputs[name] for name in _IMAGE_INPUTS if name in inputs}
            is_vision = ids == image_id(self._loaded) if images else ids < 0
            prompt = ModelInputs(ids, inputs["attention_mask"], is_vision, (ids.shape[1],), images)
            prefill(self.model, without_last(prompt), cache)
            inputs.pop("pixel_values", None)  # the images are in the cache
        self._cache = cache
        return inputs | cache_argument(self.model, cache)


@register_model("kvbench-lm")
class KVBenchLM(_FromCache, HFLM):  # type: ignore[misc]
    """A text model of the zoo; `options` are further arguments of `hf`."""

    bundled = "smollm2"

    def _fitted(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"max_length": self._loaded.max_positions, **options}

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask of one prompt; never cut.

        Raises:
            UserError: The prompt is longer than the model, less the answer's tokens.
        """
        ids, mask = super().tok_batch_encode(strings, *args, **options)
        room = left_truncate_len or self._loaded.max_positions
        self._check_length(
            ids.shape[1], room, "ask for fewer answer tokens or examples, or use another task"
        )
        return ids, mask

    def _create_tokenizer(self, *args: Any, **options: Any) -> None:
        self.tokenizer = self._loaded.tokenizer


@register_model("kvbench-vlm")
class KVBenchVLM(_FromCache, HFMultimodalLM):  # type: ignore[misc]
    """A model of the zoo that sees; `options` are further arguments of `hf-multimodal`.

    Args:
        prompt_style: `chat`: lm-eval's own text through the checkpoint's processor, and with
            `--apply_chat_template` through its template, as `hf-multimodal` does. `official`:
            MileBench's truncation and format as in `kvbench eval`, for the group milebench.
    """

    bundled = "smol_llava"

    def __init__(
        self, *arguments: Any, prompt_style: PromptStyles = "chat", **options: Any
    ) -> None:
        if prompt_style not in get_args(PromptStyles):
            raise UserError(f"prompt_style can't be {prompt_style!r}: use chat or official")
        self._official = prompt_style == "official"
        super().__init__(*arguments, **options)

    def _fitted(self, options: dict[str, Any]) -> dict[str, Any]:
        if self._loaded.entry.family == "text":
            name = self._loaded.entry.name
            raise UserError(f"{name} takes no images: kvbench-vlm needs a VLM, use kvbench-lm")
        return options

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list[list[Any]], *args: Any, **options: Any
    ) -> Mapping[str, Tensor]:
        """Inputs of one prompt; never cut, since cutting tokens would tear images apart.

        Raises:
            UserError: The prompt is longer than the model.
        """
        if self._official:
            return encode(self._loaded, strings[0], images[0]).kwargs()
        inputs: Mapping[str, Tensor] = super().tok_batch_multimodal_encode(strings, images)
        self._check_length(
            inputs["input_ids"].shape[1],
            self._loaded.max_positions,
            "use prompt_style=official, which truncates as MileBench does, or another task",
        )
        return inputs

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        """The checkpoint's template, which has no place in the official style.

        Raises:
            UserError: The style is official, or the checkpoint's processor can't be used.
        """
        if self._official or not hasattr(self.processor, "apply_chat_template"):
            raise UserError(
                "this prompt format is not the checkpoint's: leave --apply_chat_template off"
            )
        return str(super().apply_chat_template(*args, **options))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results, with method, prompt style and failures."""
        info = super().get_model_info()
        if self._official:
            info["kvbench"]["prompt_style"] = self._loaded.prompt_label
        return info

    def _create_tokenizer(self, *args: Any, **options: Any) -> None:
        self.processor = self._loaded.processor if self._official else _processor(self._loaded)
        self.tokenizer = self.processor.tokenizer

    def _model_multimodal_generate(
        self, inputs: Mapping[str, Tensor], max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        fed = self._with_cache(dict(inputs))
        out: Tensor = super()._model_multimodal_generate(fed, max_length, stop, **options)
        return out

    def _opened(self, request: Instance) -> Instance:
        """The request in this prompt style, with its images in memory."""
        context, generation, *more = request.args
        if self._official:
            question = ask(self._loaded, *_sample(request.doc))
            context, visual = question.text, list(question.prompt.images)
        elif more:
            visual = more[0]["visual"]
        else:
            return request
        images = [open_image(Path(v)) if isinstance(v, (str, Path)) else v for v in visual]
        return replace(request, arguments=(context, generation, {"visual": images}))


_IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "mm_token_type_ids")


def _loaded(pretrained: str | LoadedModel, device: str, dtype: str) -> LoadedModel:
    if isinstance(pretrained, str):
        folder = Path(pretrained).expanduser()
        text = f"{folder.resolve().name}={folder}" if folder.is_dir() else pretrained
        pretrained = load(find_model(text), device, dtype)
    return pretrained


def _prepared(
    loaded: LoadedModel, method: str, protocol: str, calibration: str | None
) -> PreparedMethod:
    choices = choose_methods(method)
    if len(choices) != 1:
        raise UserError(f"kv_method {method!r} names {len(choices)} methods: give one")
    names = statistics_for(calibrated(choices))
    statistics = None if calibration is None else kept_statistics(Path(calibration), loaded, names)
    return PreparedMethod.of(loaded, choices[0], protocol, statistics)


def _processor(loaded: LoadedModel) -> Any:
    """The checkpoint's own processor, which makes what `hf-multimodal` would make."""
    if hasattr(loaded.processor, "apply_chat_template"):
        return loaded.processor
    import transformers

    processors: Any = transformers.AutoProcessor
    try:
        return processors.from_pretrained(
            loaded.path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{loaded.path} has no usable processor ({error}): use prompt_style=official"
        ) from error


def _sample(doc: Mapping[str, Any]) -> tuple[Any, Sample]:
    """A document of the group milebench as task and sample."""
    try:
        return TASKS.get(doc["task"]), Sample.from_row(doc)
    except KeyError as error:
        raise UserError(
            f"a document lacks {error}: prompt_style=official is for tasks of the group milebench, "
            "use prompt_style=chat for others"
        ) from None
