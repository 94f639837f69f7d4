"""Formats that a one-expert model is exported in; without PyTorch, for the command line to list."""

DENSE = "dense"
"""A plain Hugging Face folder, in which zeros are stored."""
PACK_QUANTIZED = "pack-quantized"
"""The format of compressed-tensors, for experts that are quantized."""
FORMATS = (DENSE, PACK_QUANTIZED)
