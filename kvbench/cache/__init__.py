"""The cache interface: what a method implements, packed storage, transformers' Cache on top."""

from __future__ import annotations

from kvbench.cache.calibration import calibrate_statistics, load_calibration, save_calibration
from kvbench.cache.codecs import Affine, Exact
from kvbench.cache.contract import (
    DEFERRED,
    EVICTED,
    EXACT,
    Calibration,
    Codec,
    DeferringPlan,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    LogitMap,
    Needs,
    Packed,
    Plan,
    Protocols,
    SelfAttention,
    Side,
    Tokens,
    Transform,
    Window,
)
from kvbench.cache.fields import check_fields
from kvbench.cache.folding import folded_values
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.mass import column_mass, seen_by
from kvbench.cache.observers import observing
from kvbench.cache.plans import PivotDetector, PivotSalient, TextSalient, Uniform, filled
from kvbench.cache.quantized import (
    BoundMethod,
    QuantizedCache,
    RowUsage,
    bind,
    quantized_cache,
    resolve,
)
from kvbench.cache.transforms import ChannelScale, MergeHeads, PromptScale, Rotate
from kvbench.cache.windows import HeavyHitters, Residual, Sliding

__all__ = [
    "DEFERRED",
    "EVICTED",
    "EXACT",
    "Affine",
    "BoundMethod",
    "Calibration",
    "ChannelScale",
    "Codec",
    "DeferringPlan",
    "Exact",
    "ForeignCache",
    "HeavyHitters",
    "KVQuantizer",
    "LayerQuantizer",
    "LayerSpec",
    "LogitMap",
    "MergeHeads",
    "Needs",
    "Packed",
    "PivotDetector",
    "PivotSalient",
    "Plan",
    "PromptScale",
    "Protocols",
    "QuantizedCache",
    "Residual",
    "Rotate",
    "RowUsage",
    "SelfAttention",
    "Side",
    "Sliding",
    "TextSalient",
    "Tokens",
    "Transform",
    "Uniform",
    "Window",
    "bind",
    "calibrate_statistics",
    "check_fields",
    "column_mass",
    "filled",
    "folded_values",
    "load_calibration",
    "observing",
    "quantized_cache",
    "resolve",
    "save_calibration",
    "seen_by",
]
