"""A run from its settings to its metrics: prepare, expand, assemble, evaluate; and export."""
