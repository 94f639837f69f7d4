"""The results of studies on a dense model as text: neurons, clusters, pruning, allocation."""

from __future__ import annotations

from typing import Any

from sparse_expansion.report.formatting import table


def neurons_table(
    summary: list[dict[str, Any]], correlations: dict[str, float], num_tokens: int
) -> str:
    """Medians of the neurons by linear, and what the distance to the normal goes with.

    Args:
        summary: a row per linear of every block.
        correlations: of the distance with other findings, by their names.
        num_tokens: tokens that the neurons were seen on.
    """
    names = [name for name in summary[0] if name not in ("layer", "linear", "neurons")]
    rows: list[tuple[str, ...]] = [("layer, linear", "neurons", *names)]
    rows += [
        (
            f"{row['layer']:>3} {row['linear']}",
            str(row["neurons"]),
            *(f"{row[name]:.4g}" for name in names),
        )
        for row in summary
    ]
    lines = [table(rows, header=True), "", f"medians over neurons, on {num_tokens} tokens"]
    lines += [
        f"rank correlation of wasserstein with {name} inside a linear, median: {value:+.3f}"
        for name, value in correlations.items()
    ]
    return "\n".join(lines)


def sweep_table(rows: list[dict[str, Any]], neuron: int | None) -> str:
    """The rows of ``sweep-clusters``, with errors of one neuron or of the median one."""
    of = "median neuron" if neuron is None else f"neuron {neuron}"
    cells: list[tuple[str, ...]] = [
        ("linear", "clusters", "made on", "error", f"error, {of}", "to a normal, inside clusters")
    ]
    cells += [
        (
            f"{row['layer']} {row['linear']}",
            str(row["num_clusters"]),
            row["clustering"],
            f"{row['error']:.5f}",
            f"{row['neuron_error']:.5f}",
            f"{row['wasserstein_clusters']:.4f}",
        )
        for row in rows
    ]
    return f"{table(cells, header=True)}\n\nshares of the outputs' energy, on held-out text"


def pruned_table(rows: list[dict[str, Any]], dense: float, num_tokens: int) -> str:
    """The rows of ``prune-neurons``: a line per ranking, a column per share.

    Args:
        rows: a perplexity by ranking and share.
        dense: the dense model's perplexity.
        num_tokens: tokens that were scored.
    """
    shares = list(dict.fromkeys(row["share"] for row in rows))
    found = {(row["ranking"], row["share"]): row["perplexity"] for row in rows}
    cells: list[tuple[str, ...]] = [("ranking", *(f"{100 * share:g} %" for share in shares))]
    cells += [
        (ranking, *(f"{found[ranking, share]:.3f}" for share in shares))
        for ranking in dict.fromkeys(row["ranking"] for row in rows)
    ]
    return (
        f"{table(cells, header=True)}\n\nperplexity per token with so many of every linear's "
        f"neurons pruned; dense {dense:.3f}, on {num_tokens} tokens"
    )


def allocation_table(rows: list[dict[str, Any]]) -> str:
    """The rows of ``allocate``: a line per block."""
    tried = [name for name in rows[0] if name.startswith("error_")]
    more = [f"error {name.removeprefix('error_')}" for name in tried]
    cells = [("block", "gap", "sparsity", *more, *(["experts"] if tried else []))]
    for row in rows:
        line = [str(row["layer"]), f"{row['gap']:.5f}", f"{row['sparsity']:.3f}"]
        if tried:
            line += [*(f"{row[name]:.3f}" for name in tried), str(row["num_clusters"])]
        cells.append(tuple(line))
    return table(cells, header=True)
