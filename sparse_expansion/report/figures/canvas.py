"""Empty figures, made without pyplot (no display and no global state), and their files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_expansion.messages import printable
from sparse_expansion.store import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_DPI = 220
WIDTH = 5.0
"""Inches of a figure: its letters, of ten points, can be read where it is as wide as a phone."""

LEGEND_POINTS = 9


def figure_and_axes(x: str, y: str, *, height: float = 2.8) -> tuple[Figure, Axes]:
    """An empty plot, as wide as all are.

    Args:
        x: label of the horizontal axis.
        y: label of the vertical axis.
        height: inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    label_axes(axes, x, y)
    return figure, axes


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Label both axes, and leave away the frame's lines that say nothing."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def legend_above(figure: Figure, *, ncols: int, title: str | None = None) -> None:
    """A legend over the axes, which the layout makes room for: it neither hides nor is clipped.

    Args:
        figure: whose lines and bars have labels.
        ncols: entries side by side.
        title: of the legend.
    """
    figure.legend(
        frameon=False,
        ncols=ncols,
        loc="outside upper center",
        title=title,
        fontsize=LEGEND_POINTS,
        title_fontsize=LEGEND_POINTS,
        columnspacing=1.0,
        handlelength=1.4,
    )


def plain(name: str) -> str:
    """A name from a file as a label: its dollars begin no formula, and it does not hide itself.

    A label that begins with an underscore is left out of legends.
    """
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def count_from_zero(axes: Axes) -> None:
    """Put whole numbers on the horizontal axis, and zero at the foot of the vertical one."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)


def svg(figure: Figure) -> str:
    """The figure as an SVG element, without the XML header; the same bytes every time."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparse-expansion", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def save(figures: dict[str, Figure], folder: str | Path) -> list[Path]:
    """Write ``NAME.svg`` and ``NAME.png`` of every figure; returns the paths."""
    where = Path(folder)
    paths = []
    for name, figure in figures.items():
        vector, pixels = where / f"{name}.svg", where / f"{name}.png"
        write_file(vector, svg(figure).encode())
        image = io.BytesIO()
        figure.savefig(image, dpi=PNG_DPI, format="png")
        write_file(pixels, image.getvalue())
        paths += [vector, pixels]
    return paths
