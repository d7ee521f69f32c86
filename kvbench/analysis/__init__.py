"""Why a method works or fails on a model: attention patterns, pivots, outliers, error by layer."""
