"""Language models: families, streaming from disk, and the expanded form."""
