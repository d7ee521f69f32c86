"""The methods that are taken where none is named. All else in the harness asks a registry."""

from __future__ import annotations

REFERENCE = "fp16"
"""What all others are held against."""
REPRODUCED = "akvq_vl"
"""Of the paper whose claims the presets check."""
PLAIN, QUANTO = "hf_dynamic", "hf_quanto_int2"
"""What transformers itself offers under `generate`: its plain cache, the paper's kind of baseline,
and its quantized one."""

MEASURED = f"{REFERENCE},{REPRODUCED}"
"""Whose memory and speed are measured."""
ANALYZED = f"rtn_int2,rtn_int2_wht,kivi,{REPRODUCED}"
"""Whose error is taken apart by layer."""
DETECTOR = f"{REPRODUCED}[pivot_layers=all]"
"""Whose pivots are held against attention."""
TUNED = "kvtuner"
"""Whose layers a search gives bits."""
