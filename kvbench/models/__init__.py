"""Models: the zoo, loading, prompt styles, inputs and shared vision features.

Only `kvbench.models.zoo`, `find` and `prompts` are free of torch; import the others where they
are used.
"""

AUTO_MAP = "auto-map"
"""The device of a model whose layers are spread over all GPUs, and main memory if they're full."""
