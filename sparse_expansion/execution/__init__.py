"""Executors: the same units of work in one process or over a Ray cluster."""
