"""Perplexity and divergence of text that is read through the cache: teacher forcing."""
