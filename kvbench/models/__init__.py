"""Models: the zoo, loading, prompt styles, inputs and shared vision features.

Only `kvbench.models.zoo`, `find` and `prompts` are free of torch; import the others where they
are used.
"""
