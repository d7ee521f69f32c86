"""The cache interface: what a method implements, packed storage, transformers' Cache on top."""

from __future__ import annotations

from kvbench.cache.calibration import calibrate_statistics, load_calibration, save_calibration
from kvbench.cache.codecs import Affine, Exact
from kvbench.cache.contract import (
    EXACT,
    Calibration,
    Codec,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Plan,
    Protocols,
    Side,
    Tokens,
    Transform,
    Window,
)
from kvbench.cache.fields import check_fields
from kvbench.cache.folding import folded_values
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.layerwise import LayerwiseQuantizer
from kvbench.cache.observers import observing
from kvbench.cache.plans import Uniform, filled
from kvbench.cache.quantized import (
    BoundMethod,
    QuantizedCache,
    RowUsage,
    bind,
    quantized_cache,
    resolve,
)
from kvbench.cache.transforms import ChannelScale, MergeHeads, Rotate
from kvbench.cache.windows import Residual, Sliding

__all__ = [
    "EXACT",
    "Affine",
    "BoundMethod",
    "Calibration",
    "ChannelScale",
    "Codec",
    "Exact",
    "ForeignCache",
    "KVQuantizer",
    "LayerQuantizer",
    "LayerSpec",
    "LayerwiseQuantizer",
    "MergeHeads",
    "Needs",
    "Plan",
    "Protocols",
    "QuantizedCache",
    "Residual",
    "Rotate",
    "RowUsage",
    "Side",
    "Sliding",
    "Tokens",
    "Transform",
    "Uniform",
    "Window",
    "bind",
    "calibrate_statistics",
    "check_fields",
    "filled",
    "folded_values",
    "load_calibration",
    "observing",
    "quantized_cache",
    "resolve",
    "save_calibration",
]
