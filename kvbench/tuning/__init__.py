"""A table of choices, one for each layer, searched for a model under a budget."""
