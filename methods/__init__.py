"""KV-cache quantization methods: one method, one file, one frozen dataclass.

Every module defines METHODS, the names it offers and their default instances.
"""
