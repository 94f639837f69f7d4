"""Perplexity of methods over settings and seeds, as a table that grows and can be resumed.

    python -m benchmarks.quality MODEL TEXT --output DIR
    python -m benchmarks.quality MODEL TEXT --output DIR --settings my.json --hold-out 0.2

Every row is one `sparse-expansion expand` and `evaluate`, named by its flags: rows that are in
DIR/rows.json are not run again. The dense model is evaluated once. `--hold-out` measures on the
last share of the calibration text and never opens the test text: for choices. Printed, and written
as Parquet and figures: mean and standard deviation over seeds of the gap (log-perplexity over the
dense model's, nats per token), and its ratio to the reference method's gap for the same point,
calibration and seed; then the ledger of what that takes: operations of MLPs and routers per token
(`cost`) and bytes of weight files (`size`) over the dense model's, stored bits of all experts,
grids and routers per dense MLP weight (`bits`), and megabytes of weights in memory while experts
stay compressed (`MB`: streams lie there as in the files; a cache of unpacked experts comes on top).
`ledger.json` sets quantized dense models of as many bytes beside experts. Where there is more than
one calibration, gaps over calibration tokens are drawn too, a figure per point; `tokens.json` asks
for 1 to 64 clusters on 16 to 256 windows.

A settings file may name other texts under `also`: every row is measured on them too, with the
share of their tokens that go to experts made on few. `off_domain.json` does so, with the text
alone and with a mixture of it and the others (`{dataset}` stands for the text in flags).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.synthetic import command
from sparse_expansion.data.corpora import load_corpus
from sparse_expansion.report.comparison import gap_and_cost, size_of
from sparse_expansion.report.figures.canvas import figure_and_axes, save
from sparse_expansion.report.formatting import table
from sparse_expansion.report.parquet import columns_of, write_table
from sparse_expansion.store import Store

SETTINGS = Path(__file__).with_name("settings.json")
ROWS = "rows.json"
OWN_TEXT = ""
"""The name of the text that is calibrated on, among those that are measured on."""
Row = dict[str, Any]


def wanted(settings: dict[str, Any]) -> Iterator[Row]:
    """A row without results for every point, calibration, seed and method; cheap ones first."""
    left_out = {tuple(pair) for pair in settings.get("leave_out", ())}
    for seed in settings["seeds"]:
        for calibration, size in settings["calibrations"].items():
            for point, shape in settings["points"].items():
                for method, how in settings["methods"].items():
                    if (point, method) not in left_out:
                        found = {
                            "point": point,
                            "calibration": calibration,
                            "method": method,
                            "seed": seed,
                            "flags": f"{settings['common']} {size} {shape} {how} --seed {seed}",
                            "evaluation": f"{settings['common']} {settings['evaluation']}",
                        }
                        also = settings.get("also")
                        yield found if not also else found | {"also": also}


def name_of(row: Row) -> tuple[Any, ...]:
    """What tells rows apart: how each is expanded, then how it is evaluated."""
    texts = json.dumps(row.get("also", {}), sort_keys=True)
    named = tuple(row[key] for key in ("flags", "evaluation", "model", "dataset", "hold_out"))
    return (*named, texts)


def held_out(dataset: str, share: float, folder: Path) -> Path:
    """A folder whose test text is the end of the calibration text, which loses it."""
    text = load_corpus(dataset).calibration
    cut = text.rindex(" ", 0, round(len(text) * (1 - share)))
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "test.txt").write_text(text[cut:], encoding="utf-8")
    return folder


def by_text(row: Row) -> Iterator[Row]:
    """A measured row for each text that it was measured on; the first is its own."""
    yield row | {"text": OWN_TEXT}
    for text, found in row.get("others", {}).items():
        yield row | found | {"text": text}


def summary(rows: list[Row], reference: str) -> list[Row]:
    """Means over seeds of the gaps, and of their ratios to the reference's gaps seed by seed."""
    rows = [one for row in rows for one in by_text(row)]
    kinds = ("text", "point", "calibration", "method")
    gaps = {(*(row[kind] for kind in kinds), row["seed"]): row["gap"] for row in rows}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[kind] for kind in kinds), []).append(row)
    found = []
    for (text, point, calibration, method), same in groups.items():
        each = [row["gap"] for row in same]
        ratios = [
            row["gap"] / gaps[text, point, calibration, reference, row["seed"]]
            for row in same
            if (text, point, calibration, reference, row["seed"]) in gaps
        ]
        found.append(
            {
                "text": text,
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
                # Rows of earlier versions lack them.
                **{
                    name: statistics.mean(row.get(name, math.nan) for row in same)
                    for name in ("size", "bits", "memory_bytes")
                },
                "calibration_tokens": same[0]["calibration_tokens"],
            }
        )
    return found


def summary_table(found: list[Row], reference: str) -> str:
    """The summary as text."""
    cells: list[tuple[str, ...]] = [
        (
            "point, calibration, method, text",
            "seeds",
            "perplexity",
            "gap",
            f"of {reference}",
            "cost",
            "size",
            "bits",
            "MB",
        )
    ]
    cells += [
        (
            ", ".join(filter(None, (row["point"], row["calibration"], row["method"], row["text"]))),
            str(row["seeds"]),
            f"{row['perplexity']:.3f}",
            f"{row['gap']:.4f} ({row['gap_deviation']:.4f})",
            f"{row['ratio']:.3f} ({row['ratio_deviation']:.3f})",
            f"{row['cost']:.3f}",
            f"{row['size']:.2f}",
            f"{row['bits']:.2f}",
            f"{row['memory_bytes'] / 1e6:.0f}",
        )
        for row in found
    ]
    return f"{table(cells, header=True)}\n\ndense perplexity and flags are in {ROWS}"


def ratios_figure(found: list[Row], calibration: str, reference: str) -> Any:
    """Ratios to the reference's gap, points beside each other, a colour per method."""
    rows = [r for r in found if r["calibration"] == calibration and r["text"] == OWN_TEXT]
    return bars(rows, "point", reference, title=calibration)


def texts_figure(found: list[Row], calibration: str, point: str, reference: str) -> Any:
    """Ratios to the reference's gap, texts beside each other, a colour per method."""
    rows = [row for row in found if (row["calibration"], row["point"]) == (calibration, point)]
    named = [row | {"text": row["text"] or "calibrated on"} for row in rows]
    return bars(named, "text", reference, title=f"{point}, {calibration}")


def bars(rows: list[Row], along: str, reference: str, *, title: str) -> Any:
    """Ratios of rows to the reference's gap, a colour per method.

    Args:
        rows: of a summary.
        along: what lies beside each other, ``point`` or ``text``.
        reference: the method whose gap is 1.
        title: of the figure.
    """
    points = list(dict.fromkeys(row[along] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = figure_and_axes("", f"gap over that of {reference}")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        same = [row for row in rows if row["method"] == method]
        places = [points.index(row[along]) + (number + 0.5) * width - 0.4 for row in same]
        heights = [row["ratio"] for row in same]
        spread = [row["ratio_deviation"] for row in same]
        axes.bar(places, heights, width, yerr=spread, label=method, color=f"C{number}")
    axes.axhline(1, color="0.5", linestyle=":")
    axes.set_xticks(range(len(points)), points)
    axes.set_title(title, fontsize="medium", loc="left")
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def curves_figure(found: list[Row], point: str) -> Any:
    """Gap over calibration tokens, a line per method."""
    rows = [row for row in found if row["point"] == point and row["text"] == OWN_TEXT]
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


def evaluated(row: Row, model: str | Path, dataset: str) -> dict[str, Any]:
    """The result of `evaluate` of a dense or expanded model, as the row asks."""
    return command("evaluate", "--model", model, "--dataset", dataset, *row["evaluation"].split())


def measured_row(row: Row, texts: dict[str, str], dense: dict[str, float]) -> Row:
    """The row with its results: one expansion, and an evaluation on every text.

    Args:
        row: a row without results.
        texts: the texts to measure on by name; calibrated is on ``OWN_TEXT`` where the row's flags
            do not say otherwise.
        dense: the dense model's perplexities on them.
    """
    flags = row["flags"].format_map({"dataset": texts[OWN_TEXT], **texts}).split()
    with tempfile.TemporaryDirectory() as output:
        where = ["--model", row["model"], "--dataset", texts[OWN_TEXT]]
        metrics = command("expand", *where, *flags, "--output", output)
        scored = {text: evaluated(row, output, dataset) for text, dataset in texts.items()}
    own = scored.pop(OWN_TEXT)
    metrics |= {
        "perplexity_dense": dense[OWN_TEXT],
        "perplexity_expanded": own["perplexity"],
        "num_eval_tokens": own["num_eval_tokens"],
    }
    others = {
        text: {
            "perplexity_dense": dense[text],
            "perplexity": result["perplexity"],
            "gap": math.log(result["perplexity"] / dense[text]),
            "num_eval_tokens": result["num_eval_tokens"],
            **result["routed"],
        }
        for text, result in scored.items()
    }
    return row | found_in(metrics) | own["routed"] | {"others": others}


def found_in(metrics: dict[str, Any]) -> Row:
    """What a row keeps of a run's metrics."""
    calibration = metrics["config"]["calibration"]
    return {
        **gap_and_cost(metrics),
        # All experts lie on the disk and in the memory of whoever serves them.
        "size": size_of(metrics),
        "bits": metrics["bits_per_weight"],
        # But for the headers of the files, which are some kilobytes.
        "memory_bytes": metrics["checkpoint_bytes"],
        "starved_experts": metrics["starved_experts"],
        "calibration_tokens": calibration["dataset_size"] * calibration["seqlen"],
        "num_eval_tokens": metrics["num_eval_tokens"],
        "seconds": metrics["seconds"]["expand"],
    }


def measure_missing(rows: list[Row], texts: dict[str, str], store: Store) -> list[Row]:
    """Measure the rows that the store's file lacks, and write it after each.

    Args:
        rows: rows without results.
        texts: see ``measured_row``.
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
            dense = {one["text"]: one["perplexity_dense"] for one in by_text(same[0])}
        else:
            dense = {
                text: evaluated(row, row["model"], dataset)["perplexity"]
                for text, dataset in texts.items()
            }
        measured[name_of(row)] = measured_row(row, texts, dense)
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
    if settings.get("also"):
        figures |= {
            f"texts-{number}-{place}": texts_figure(
                found, calibration, point, settings["reference"]
            )
            for number, calibration in enumerate(settings["calibrations"])
            for place, point in enumerate(settings["points"])
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
        texts = {OWN_TEXT: args.dataset, **settings.get("also", {})}
        if args.hold_out is not None:
            texts = {
                name: str(held_out(dataset, args.hold_out, Path(folder) / f"text-{number}"))
                for number, (name, dataset) in enumerate(texts.items())
            }
        measured = measure_missing(rows, texts, Store(args.output))
    found = summary(measured, settings["reference"])
    write_table(columns_of(found), str(args.output / "summary.parquet"))
    save(figures_of(found, settings), args.output)
    print(summary_table(found, settings["reference"]))


if __name__ == "__main__":
    main()
