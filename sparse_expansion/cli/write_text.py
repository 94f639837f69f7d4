"""``write-text``: text that a model writes itself, to calibrate on."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_expansion.api.evaluation import open_model
from sparse_expansion.cli.command import Command
from sparse_expansion.cli.flags import add_settings
from sparse_expansion.cli.opening import begin_work, origin, print_result
from sparse_expansion.cli.shared_flags import add_model
from sparse_expansion.config.execution import ExecutionOptions

_EXAMPLES = """\
  sparse-expansion write-text --model ./my-model --output own.jsonl
  # calibrate on as much of it as of another text
  sparse-expansion run --model ./my-model --dataset wikitext2:1,own.jsonl:1 --output ./expanded
"""


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    group = parser.add_argument_group("text")
    group.add_argument(
        "--output", metavar="FILE.jsonl", required=True, help="File to write, a document per line."
    )
    group.add_argument("--documents", type=int, default=72, metavar="N", help="Documents to write.")
    group.add_argument(
        "--seqlen", type=int, default=512, metavar="L", help="Tokens of every document."
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="Temperature of the samples; 1 is the model's own distribution.",
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="Seed of the samples.")
    group.add_argument(
        "--resume",
        action="store_true",
        help="Keep what an interrupted command with the same settings has written.",
    )
    group.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="Documents written at a time."
    )
    add_settings(parser, ExecutionOptions, names=("device", "threads"))


def run(args: argparse.Namespace) -> int:
    """Write the documents, and say how many there are."""
    file = _checked_output(args.output, resume=args.resume)
    _ = ExecutionOptions(device=args.device, threads=args.threads)
    source = origin(args, args.model, args.model_size)
    begin_work(args)
    from sparse_expansion.jobs.own_text import Sampling, read_written, write_documents

    sampling = Sampling(
        documents=args.documents,
        seqlen=args.seqlen,
        seed=args.seed,
        temperature=args.temperature,
        batch_size=args.batch_size,
    )
    texts = read_written(file, sampling) if file.exists() else []
    import torch

    from sparse_expansion.jobs.whole_model import load_whole
    from sparse_expansion.model.families import check_seqlen

    shell = open_model(source, "auto", args.progress)
    check_seqlen(sampling.seqlen, shell.config)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_whole(shell.folder, device=args.device, dtype="auto", verify=False)

    def written(count: int) -> None:
        args.progress.doing(f"writing documents ({count} of {sampling.documents})")

    written(len(texts))
    write_documents(model, tokenizer, sampling, file=file, texts=texts, written=written)
    result = {
        "model": source.name,
        "output": str(file),
        "documents": sampling.documents,
        "tokens": sampling.documents * sampling.seqlen,
        "bytes": file.stat().st_size,
    }
    text = f"{sampling.documents} documents of {sampling.seqlen} tokens in {file}"
    print_result(args, result, text, sort_keys=True)
    return 0


def _checked_output(name: str, *, resume: bool) -> Path:
    """The file to write.

    Raises:
        ValueError: its name has another ending, its folder is missing, or it is there already.
    """
    file = Path(name).expanduser()
    if "://" in name or file.suffix != ".jsonl":
        raise ValueError(f"--output {name} must be a local file that ends in .jsonl")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--output {name}: its folder does not exist, make it first")
    if file.exists() and not resume:
        raise ValueError(
            f"--output {name} is there already: give another, or add --resume to continue it"
        )
    return file.absolute()


WRITE_TEXT = Command(
    name="write-text",
    help="Write text with a model itself, to calibrate it on.",
    examples=_EXAMPLES,
    add_flags=_add_flags,
    run=run,
)
