"""Which methods can live in a static cache, and why the others can't."""

from __future__ import annotations

from kvbench.cache.codecs import Affine
from kvbench.cache.contract import EXACT, DeferringPlan, LayerQuantizer, LayerSpec, Transform
from kvbench.cache.fused import UNREADABLE, is_even
from kvbench.cache.quantized import BoundMethod
from kvbench.cache.windows import Residual, Sliding
from kvbench.efficiency.workload import Workload, cache_layout, generated_bits


def unsupported(bound: BoundMethod, workload: Workload) -> str | None:
    """Why a method can't have a static cache, or None if it can."""
    if bound.protocol != "exact_prefill":
        return "its prompts attend to what is stored"
    for quantizer, spec in zip(bound.quantizers, bound.specs, strict=True):
        if reason := _unsupported_layer(quantizer, spec, workload):
            return reason
    if len({quantizer.key.window for quantizer in bound.quantizers}) > 1:
        return "its layers keep different windows"
    layouts = cache_layout(bound.quantizers, bound.specs, workload).layers
    if any(layout.generated == EXACT and layout.key.packed for layout in layouts):
        return "generated tokens stay exact beside a packed prompt"
    return None


def _unsupported_layer(
    quantizer: LayerQuantizer, spec: LayerSpec, workload: Workload
) -> str | None:
    if spec.sliding_window is not None and spec.sliding_window < workload.cached_tokens:
        return "the model's attention window is shorter than the sequence"
    if quantizer.heads_apart or quantizer.evicts:
        return "its heads or rows hold tokens of their own"
    if quantizer.logit_maps:
        return "the logits of some tokens are changed before softmax"
    if isinstance(quantizer.plan, DeferringPlan):
        return "its plan decides when tokens leave the window"
    first = generated_bits(quantizer.plan, before=workload.input_tokens)
    if first != generated_bits(quantizer.plan):
        return "tokens that follow a short prompt are stored unlike later ones"
    for side in (quantizer.key, quantizer.value):
        if side.pre_rope:
            return "keys are stored before rotary embedding"
        if side.transform.stored_shape(spec) != (spec.num_kv_heads, spec.head_dim):
            return "heads are stored together"
        if side.recent is not None or type(side.transform).fit is not Transform.fit:
            return "its window or its change of basis depends on the prompt"
        for bits, codec in side.codecs.items():
            if bits != EXACT and not is_even(codec):
                return UNREADABLE
            if isinstance(codec, Affine) and type(codec).encode is not Affine.encode:
                return "kernels read what its codec stores but can't write it"
    folded = quantizer.value.transform
    if type(folded) is not Transform and folded.matrices(spec) is None:
        return "its value transform can't be folded into the weights"
    return _unsupported_windows(quantizer)


def _unsupported_windows(quantizer: LayerQuantizer) -> str | None:
    key, value = quantizer.key.window, quantizer.value.window
    along_tokens = any(
        isinstance(codec, Affine) and codec.along == "tokens"
        for side in (quantizer.key, quantizer.value)
        for codec in side.codecs.values()
    )
    if key == value and not along_tokens:
        if key is None or (isinstance(key, Sliding) and key.flush_every == 1):
            return None
        return "its window releases tokens in groups"
    if (
        isinstance(key, Residual)
        and key.prompt_block is None
        and isinstance(value, Sliding)
        and value.flush_every == 1
        and value.prompt
        and value.size + (not value.counts_current) > key.size
        and len(quantizer.key.codecs) == len(quantizer.value.codecs) == 1
        and all(c.block == 1 for c in quantizer.value.codecs.values())
    ):
        return None
    return "its keys and values leave their windows in a way that has no schedule"
