"""The cache interface: what a method implements, packed storage, transformers' Cache on top."""

from __future__ import annotations

from kvbench.cache.argument import cache_argument
from kvbench.cache.calibration import calibrate_statistics, load_calibration, save_calibration
from kvbench.cache.codecs import Affine, Exact, check_packable
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
from kvbench.cache.floats import Float8
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.hadamard import rotation
from kvbench.cache.layerwise import LayerwiseQuantizer
from kvbench.cache.mass import column_mass, seen_by
from kvbench.cache.observers import observing
from kvbench.cache.plans import (
    PivotDetector,
    PivotSalient,
    TextSalient,
    Uniform,
    filled,
    kept_exact,
)
from kvbench.cache.quantized import (
    BoundMethod,
    QuantizedCache,
    RowUsage,
    bind,
    quantized_cache,
    resolve,
)
from kvbench.cache.transforms import ChannelScale, MergeHeads, Orthogonal, PromptScale, Rotate
from kvbench.cache.windows import HeavyHitters, Residual, Sliding
from kvbench.kernels.packing import pack, unpack
from kvbench.kernels.rounding import Rounding

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
    "Float8",
    "ForeignCache",
    "HeavyHitters",
    "KVQuantizer",
    "LayerQuantizer",
    "LayerSpec",
    "LayerwiseQuantizer",
    "LogitMap",
    "MergeHeads",
    "Needs",
    "Orthogonal",
    "Packed",
    "PivotDetector",
    "PivotSalient",
    "Plan",
    "PromptScale",
    "Protocols",
    "QuantizedCache",
    "Residual",
    "Rotate",
    "Rounding",
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
    "cache_argument",
    "calibrate_statistics",
    "check_fields",
    "check_packable",
    "column_mass",
    "filled",
    "kept_exact",
    "load_calibration",
    "observing",
    "pack",
    "quantized_cache",
    "resolve",
    "rotation",
    "save_calibration",
    "seen_by",
    "unpack",
]
