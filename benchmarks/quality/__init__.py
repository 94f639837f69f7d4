"""Perplexity of methods over settings and seeds: ``python -m benchmarks.quality``."""
