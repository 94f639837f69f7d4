"""Perplexity of methods over settings and seeds, as a table that grows and can be resumed.

    python -m benchmarks.quality MODEL TEXT --output DIR
    python -m benchmarks.quality MODEL TEXT --output DIR --settings my.json --hold-out 0.2

Every row is one `sparse-expansion expand` and `evaluate`, named by its flags: rows that are in
DIR/rows.json are not run again. The dense model is evaluated once. `--hold-out` measures on the
last share of the calibration text and never opens the test text: for choices. Printed, and written
as Parquet and figures: mean and standard deviation over seeds of the gap (log-perplexity over the
dense model's, nats per token), and its ratio to the reference method's gap for the same point,
calibration and seed. Where there is more than one calibration, gaps over calibration tokens are
drawn too, a figure per point; `tokens.json` asks for 1 to 64 clusters on 16 to 256 windows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.synthetic import command
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.report.comparison import gap_and_cost
from sparse_expansion.report.figures.canvas import figure_and_axes, save
from sparse_expansion.report.formatting import table
from sparse_expansion.report.parquet import columns_of, write_table
from sparse_expansion.store import Store

SETTINGS = Path(__file__).with_name("settings.json")
ROWS = "rows.json"
Row = dict[str, Any]


def wanted(settings: dict[str, Any]) -> Iterator[Row]:
    """A row without results for every point, calibration, seed and method; cheap ones first."""
    left_out = {tuple(pair) for pair in settings.get("leave_out", ())}
    for seed in settings["seeds"]:
        for calibration, size in settings["calibrations"].items():
            for point, shape in settings["points"].items():
                for method, how in settings["methods"].items():
                    if (point, method) not in left_out:
                        yield {
                            "point": point,
                            "calibration": calibration,
                            "method": method,
                            "seed": seed,
                            "flags": f"{settings['common']} {size} {shape} {how} --seed {seed}",
                            "evaluation": f"{settings['common']} {settings['evaluation']}",
                        }


def name_of(row: Row) -> tuple[Any, ...]:
    """What tells rows apart: how each is expanded, then how it is evaluated."""
    return tuple(row[key] for key in ("flags", "evaluation", "model", "dataset", "hold_out"))


def held_out(dataset: str, share: float, folder: Path) -> Path:
    """A folder whose test text is the end of the calibration text, which loses it."""
    text = load_corpus(dataset).calibration
    cut = text.rindex(" ", 0, round(len(text) * (1 - share)))
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "test.txt").write_text(text[cut:], encoding="utf-8")
    return folder


def summary(rows: list[Row], reference: str) -> list[Row]:
    """Means over seeds of the gaps, and of their ratios to the reference's gaps seed by seed."""
    gaps = {(r["point"], r["calibration"], r["method"], r["seed"]): r["gap"] for r in rows}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["point"], row["calibration"], row["method"]), []).append(row)
    found = []
    for (point, calibration, method), same in groups.items():
        each = [row["gap"] for row in same]
        ratios = [
            row["gap"] / gaps[point, calibration, reference, row["seed"]]
            for row in same
            if (point, calibration, reference, row["seed"]) in gaps
        ]
        found.append(
            {
                "point": point,
                "calibration": calibration,
                "method": method,
                "seeds": len(same),
                "perplexity": statistics.mean(row["perplexity"] for row in same),
                "gap": statistics.mean(each),
                "gap_deviation": statistics.stdev(each) if len(each) > 1 else 0.0,
                "ratio": statistics.mean(ratios) if ratios else float("nan"),
                "ratio_deviation": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
                "cost": statistics.mean(row["cost"] for row in same),
                "calibration_tokens": same[0]["calibration_tokens"],
            }
        )
    return found


def summary_table(found: list[Row], reference: str) -> str:
    """The summary as text."""
    cells: list[tuple[str, ...]] = [
        ("point, calibration, method", "seeds", "perplexity", "gap", f"of {reference}", "cost")
    ]
    cells += [
        (
            f"{row['point']}, {row['calibration']}, {row['method']}",
            str(row["seeds"]),
            f"{row['perplexity']:.3f}",
            f"{row['gap']:.4f} ({row['gap_deviation']:.4f})",
            f"{row['ratio']:.3f} ({row['ratio_deviation']:.3f})",
            f"{row['cost']:.3f}",
        )
        for row in found
    ]
    return f"{table(cells, header=True)}\n\ndense perplexity and flags are in {ROWS}"


def ratios_figure(found: list[Row], calibration: str, reference: str) -> Any:
    """Ratios to the reference's gap, points beside each other, a colour per method."""
    rows = [row for row in found if row["calibration"] == calibration]
    points = list(dict.fromkeys(row["point"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = figure_and_axes("", f"gap over that of {reference}")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        same = [row for row in rows if row["method"] == method]
        places = [points.index(row["point"]) + (number + 0.5) * width - 0.4 for row in same]
        heights = [row["ratio"] for row in same]
        spread = [row["ratio_deviation"] for row in same]
        axes.bar(places, heights, width, yerr=spread, label=method, color=f"C{number}")
    axes.axhline(1, color="0.5", linestyle=":")
    axes.set_xticks(range(len(points)), points)
    axes.set_title(calibration, fontsize="medium", loc="left")
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def curves_figure(found: list[Row], point: str) -> Any:
    """Gap over calibration tokens, a line per method."""
    rows = [row for row in found if row["point"] == point]
    figure, axes = figure_and_axes("calibration tokens", "gap, nats per token")
    for method in dict.fromkeys(row["method"] for row in rows):
        same = sorted(
            (row for row in rows if row["method"] == method),
            key=lambda row: int(row["calibration_tokens"]),
        )
        tokens = [row["calibration_tokens"] for row in same]
        spread = [row["gap_deviation"] for row in same]
        axes.errorbar(tokens, [row["gap"] for row in same], spread, label=method, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({row["calibration_tokens"] for row in rows}))
    axes.set_xticklabels(f"{tokens:,}" for tokens in ticks)
    axes.set_ylim(bottom=0)
    axes.set_title(point, fontsize="medium", loc="left")
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def measured_row(row: Row, dataset: str, dense: float) -> Row:
    """The row with its results: one expansion and one evaluation.

    Args:
        row: a row without results.
        dataset: the text to calibrate and to measure on.
        dense: the dense model's perplexity on it.
    """
    with tempfile.TemporaryDirectory() as output:
        flags = ["--model", row["model"], "--dataset", dataset, *row["flags"].split()]
        metrics = command("expand", *flags, "--output", output)
        evaluation = ["--dataset", dataset, *row["evaluation"].split()]
        scored = command("evaluate", "--model", output, *evaluation)
    metrics |= {
        "perplexity_dense": dense,
        "perplexity_expanded": scored["perplexity"],
        "num_eval_tokens": scored["num_eval_tokens"],
    }
    return row | found_in(metrics)


def found_in(metrics: dict[str, Any]) -> Row:
    """What a row keeps of a run's metrics."""
    calibration = metrics["config"]["calibration"]
    return {
        **gap_and_cost(metrics),
        "starved_experts": metrics["starved_experts"],
        "calibration_tokens": calibration["dataset_size"] * calibration["seqlen"],
        "num_eval_tokens": metrics["num_eval_tokens"],
        "seconds": metrics["seconds"]["expand"],
    }


def measure_missing(rows: list[Row], dataset: str, store: Store) -> list[Row]:
    """Measure the rows that the store's file lacks, and write it after each.

    Args:
        rows: rows without results.
        dataset: the text to calibrate and to measure on.
        store: the folder with the file.

    Returns:
        The rows with their results.
    """
    known: list[Row] = store.read_json(ROWS) if store.exists(ROWS) else []
    measured = {name_of(row): row for row in known}
    for row in rows:
        if name_of(row) in measured:
            continue
        same = [each for each in measured.values() if name_of(each)[1:] == name_of(row)[1:]]
        if same:
            dense = same[0]["perplexity_dense"]
        else:
            where = ["--model", row["model"], "--dataset", dataset]
            dense = command("evaluate", *where, *row["evaluation"].split())["perplexity"]
        measured[name_of(row)] = measured_row(row, dataset, dense)
        store.write_json(ROWS, list(measured.values()))
    # A changed settings file leaves rows behind that it does not ask for: they stay in the file.
    return [measured[name] for name in dict.fromkeys(map(name_of, rows))]


def figures_of(found: list[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """Every calibration's ratios, and where there are several, every point's curves, by name."""
    figures = {
        f"ratios-{number}": ratios_figure(found, calibration, settings["reference"])
        for number, calibration in enumerate(settings["calibrations"])
    }
    if len(settings["calibrations"]) > 1:
        figures |= {
            f"tokens-{number}": curves_figure(found, point)
            for number, point in enumerate(settings["points"])
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the summary of all there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", type=Path, default=SETTINGS)
    parser.add_argument(
        "--hold-out", type=float, help="share of the calibration text to measure on"
    )
    args = parser.parse_args(arguments)
    settings = json.loads(args.settings.read_text(encoding="utf-8"))
    text = {"model": str(args.model), "dataset": args.dataset, "hold_out": args.hold_out}
    rows = [row | text for row in wanted(settings)]
    with tempfile.TemporaryDirectory() as folder:
        dataset = args.dataset
        if args.hold_out is not None:
            dataset = str(held_out(args.dataset, args.hold_out, Path(folder) / "text"))
        measured = measure_missing(rows, dataset, Store(args.output))
    found = summary(measured, settings["reference"])
    write_table(columns_of(found), str(args.output / "summary.parquet"))
    save(figures_of(found, settings), args.output)
    print(summary_table(found, settings["reference"]))


if __name__ == "__main__":
    main()
