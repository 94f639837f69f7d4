"""Figures: of a run, of its neurons, of studies, and of runs beside each other.

Functions return matplotlib figures; ``canvas.save`` writes them as SVG and PNG, ``canvas.svg``
gives one as markup.
"""
