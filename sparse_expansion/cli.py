"""Command line: flags to settings, settings to a job, results to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparse_expansion.config import RANKINGS, RunConfig
from sparse_expansion.flags import (
    ALL_WINDOWS,
    EXIT_BAD_INPUT,
    check_execution,
    check_tasks,
    cluster_settings,
    experiment_config,
    numbers,
    parse_arguments,
    parse_size,
    run_config,
)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 failed at work, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        args = parse_arguments(given)
    except SystemExit as stop:
        return int(stop.code or 0)
    args.line = shlex.join(["sparse-expansion", *given])
    _quieten(args.verbose)
    _end_cleanly_on_sigterm()
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        _complain("interrupted: finished units are kept, continue with --resume")
        return EXIT_INTERRUPTED
    except _Terminated:
        _complain("terminated: finished units are kept, continue with --resume")
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The reader of our output (a pager, `head`) has gone: not an error of ours.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed by the interpreter
        return EXIT_FAILED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" writing {error.filename}" if error.filename else ""
            _complain(
                f"no space left on the disk{where}: free some, then continue with --resume "
                "(finished units are kept)"
            )
            return EXIT_FAILED
        _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return EXIT_FAILED
    except ValueError as error:
        if args.verbose:
            logging.exception("the error in full")
        _complain(" ".join(str(error).split()))
        return EXIT_FAILED if _is_work_failure(error) else EXIT_BAD_INPUT


class _Terminated(BaseException):
    """SIGTERM, which is what ``ray job stop`` and a cluster that shrinks send first."""


def _end_cleanly_on_sigterm() -> None:
    if threading.current_thread() is not threading.main_thread():
        return

    def terminate(signum: int, frame: object) -> NoReturn:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)


def _is_work_failure(error: ValueError) -> bool:
    from sparse_expansion.types import CompressionError

    return isinstance(error, CompressionError)


def _complain(message: str) -> None:
    print(f"sparse-expansion: error: {message}", file=sys.stderr)


def _quieten(verbose: bool) -> None:
    """Libraries' own bars and advice would hide ours."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s"
    )
    if not verbose:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import warnings

        warnings.filterwarnings("ignore")


def _dispatch(args: argparse.Namespace) -> int:
    if args.command in ("run", "expand"):
        return _run(args)
    handlers = {
        "evaluate": _evaluate,
        "plan": _plan,
        "analyze": _analyze,
        "export": _export,
        "report": _report,
        "compare": _compare,
        "sweep-clusters": _experiment,
        "prune-neurons": _experiment,
        "allocate": _experiment,
    }
    return handlers[args.command](args)


def _silence_transformers(verbose: bool) -> None:
    if not verbose:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _seqlen(args: argparse.Namespace, config: Any) -> int:
    from sparse_expansion.model.sources import DEFAULT_SEQLEN

    if args.seqlen is not None:
        return int(args.seqlen)
    default = DEFAULT_SEQLEN["llama" if config.model_type == "llama" else "pythia"]
    return min(default, int(getattr(config, "max_position_embeddings", default) or default))


def _executor(args: argparse.Namespace, **what: Any) -> Any:
    """The executor asked for; ``what`` are the job's own fields of ``WorkerSpec``."""
    from sparse_expansion.stages import WorkerSpec

    spec = WorkerSpec(
        cache_dir=args.cache_dir,
        revision=args.model_revision,
        device=args.device,
        threads=args.threads,
        activation_bytes=parse_size(args.activation_memory),
        scratch=args.scratch,
        **what,
    )
    if args.executor == "local":
        from sparse_expansion.execution.local import LocalExecutor

        return LocalExecutor(spec)
    from sparse_expansion.execution.ray import RayExecutor, RayOptions

    memory = args.object_store_memory
    executor = RayExecutor(
        spec,
        RayOptions(
            address=args.ray_address,
            num_workers=args.num_workers,
            gpus_per_worker=args.gpus_per_worker,
            cpus_per_worker=args.cpus_per_worker,
            max_attempts=args.max_attempts,
            worker_timeout=args.worker_timeout,
            object_store_bytes=None if memory is None else parse_size(memory),
        ),
    )
    # Joining Ray put its own handler in place, which dumps a stack and dies.
    _end_cleanly_on_sigterm()
    return executor


def _measure_ceilings(
    args: argparse.Namespace, executor: Any, config: RunConfig, measured: Any, line: Any
) -> None:
    """With ``--profile``, what a worker's device can do."""
    from sparse_expansion.jobs import measure_ceilings

    if args.profile:
        line.say("measuring the ceilings of a worker")
        measure_ceilings(executor, config, measured)


def _evaluation_split(args: argparse.Namespace, executor: Any) -> dict[str, Any]:
    """Shards of windows and ranges of blocks, by the workers there are."""
    return {"num_shards": executor.num_workers, "num_ranges": args.eval_pipeline}


def _check_output(output: str) -> None:
    """A folder that cannot be made is bad input, not a failure after an hour."""
    if "://" in output:
        return
    parent = Path(output).expanduser().resolve()
    if parent.exists() and not parent.is_dir():
        raise ValueError(f"--output {output} is a file: choose a folder")
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--output {output}: {parent} is not writable")


def _run(args: argparse.Namespace) -> int:
    # Flags first, before anything slow is imported or read.
    run_config(args, args.seqlen or 2048)
    check_execution(args)
    if args.output is not None:
        _check_output(args.output)
    elif args.resume:
        raise ValueError("--resume needs the --output folder of the run to continue")
    from sparse_expansion.data.corpora import check_dataset
    from sparse_expansion.model.sources import fetch_model, resolve_name

    check_dataset(args.dataset)
    source = resolve_name(args.model, args.model_size)
    _silence_transformers(args.verbose)
    from sparse_expansion import jobs
    from sparse_expansion.model.streaming import load_config
    from sparse_expansion.progress import ProgressLine
    from sparse_expansion.report import model_card
    from sparse_expansion.run_files import COMMAND_FILE, METRICS_FILE
    from sparse_expansion.store import Store

    line = ProgressLine()
    line.say(f"model {source.location}")
    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    config = run_config(args, _seqlen(args, load_config(folder)))
    prepared, windows = jobs.prepare(
        config, folder, dataset=args.dataset, cache_dir=args.cache_dir, model_name=source.location
    )
    config = prepared.config
    if advice := jobs.slow_dtype(prepared.shell.dtype):
        line.say(advice)
    evaluating = args.command == "run"
    if evaluating:
        tokens = jobs.evaluation_tokens(
            prepared.evaluation_text,
            prepared.encode,
            seqlen=config.calibration.seqlen,
            max_windows=args.eval_windows,
            vocabulary=int(prepared.shell.config.vocab_size),
        )
    with contextlib.ExitStack() as stack:
        output = args.output
        if output is None:
            output = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparse-expansion-"))
        store = Store(output)
        jobs.claim(store, prepared, windows, resume=args.resume)
        del windows
        store.write_json(COMMAND_FILE, {"command": args.line})
        where = output if "://" in output else str(Path(output).expanduser().resolve())
        measured = jobs.Measurements()
        executor = _executor(args, store=where, source=source)
        try:
            _measure_ceilings(args, executor, config, measured, line)
            line.start("expand", prepared.shell.num_blocks)
            jobs.expand(prepared, store, executor, line.update, measured)
            metrics = jobs.expansion_metrics(prepared, store, args.executor)
            metrics["command"] = args.line
            if evaluating:
                for kind in ("dense", "expanded"):
                    prefix = "dense_" if kind == "dense" else ""
                    line.start(f"evaluate {kind}", prepared.shell.num_blocks)
                    nll, _ = jobs.evaluate(
                        kind,
                        tokens,
                        config,
                        prepared.shell,
                        executor,
                        line.update,
                        measured,
                        model_bytes=metrics[f"{prefix}checkpoint_bytes"],
                        **_evaluation_split(args, executor),
                    )
                    line.say(f"{kind} perplexity {nll.perplexity:.3f}")
                    metrics[f"perplexity_{kind}"] = nll.perplexity
                    metrics["num_eval_tokens"] = nll.num_tokens
            metrics = jobs.finish_metrics(metrics, measured)
            store.write_json(METRICS_FILE, metrics)
            card = model_card(metrics, source.location, is_hub_id=source.kind == "hub")
            store.write_bytes("README.md", card.encode())
        finally:
            executor.close()
            line.close()
        if args.json:
            print(json.dumps(metrics, indent=1, sort_keys=True))
        else:
            from sparse_expansion.report import run_table

            print(run_table(metrics, args.output))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    if args.seqlen is not None and args.seqlen < 2:
        raise ValueError(f"--seqlen {args.seqlen} must be at least 2 tokens")
    check_execution(args)
    check_tasks(args)
    if args.tasks is not None:
        return _evaluate_tasks(args)
    from sparse_expansion.data.corpora import check_dataset, load_corpus
    from sparse_expansion.data.tokenization import encoder, load_tokenizer
    from sparse_expansion.model.sources import fetch_model, resolve_name

    check_dataset(args.dataset)
    source = resolve_name(args.model, args.model_size)
    _silence_transformers(args.verbose)
    from sparse_expansion import jobs
    from sparse_expansion.model.manifest import verify
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.progress import ProgressLine

    line = ProgressLine()
    line.say(f"model {source.location}")
    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    shell = ModelShell(folder, dtype=args.dtype)
    if shell.expansion is not None:
        line.say(f"{verify(folder)} tensors agree with their digests")
    seqlen = _seqlen(args, shell.config)
    tokens = jobs.evaluation_tokens(
        load_corpus(args.dataset, cache_dir=args.cache_dir).evaluation,
        encoder(load_tokenizer(folder)),
        seqlen=seqlen,
        max_windows=args.eval_windows,
        vocabulary=int(shell.config.vocab_size),
    )
    config = RunConfig(dtype=args.dtype)
    executor = _executor(args, store=str(folder), source=source)
    measured = jobs.Measurements()
    try:
        _measure_ceilings(args, executor, config, measured, line)
        line.start("evaluate", shell.num_blocks)
        nll, per_window = jobs.evaluate(
            "dense",
            tokens,
            config,
            shell,
            executor,
            line.update,
            measured,
            model_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            **_evaluation_split(args, executor),
        )
    finally:
        executor.close()
        line.close()
    result = {
        "model": source.location,
        "is_expanded": shell.expansion is not None,
        "perplexity": nll.perplexity,
        "num_eval_tokens": nll.num_tokens,
        "num_windows": len(per_window),
        "seqlen": seqlen,
        "dataset": args.dataset,
        "seconds": measured.seconds["evaluate_dense"],
        "peak_memory_bytes": measured.peak_memory_bytes,
    }
    profile = measured.profile()
    if profile is not None:
        result["profile"] = profile
    if args.json:
        print(json.dumps(result, indent=1, sort_keys=True))
    else:
        from sparse_expansion.report import evaluation_table

        print(evaluation_table(result))
    return 0


def _evaluate_tasks(args: argparse.Namespace) -> int:
    from sparse_expansion import harness
    from sparse_expansion.model.manifest import verify
    from sparse_expansion.model.sources import fetch_model, resolve_name
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.progress import ProgressLine
    from sparse_expansion.report import tasks_table

    source = resolve_name(args.model, args.model_size)
    tasks = [name for name in args.tasks.split(",") if name]
    manager = harness.check_tasks(tasks, args.task_path)
    _silence_transformers(args.verbose)
    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    is_expanded = ModelShell(folder, dtype=args.dtype).expansion is not None
    line = ProgressLine()
    line.say(f"model {source.location}")
    if is_expanded:
        line.say(f"{verify(folder)} tensors agree with their digests")
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    results = harness.run_tasks(
        folder,
        tasks,
        manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )
    line.close()
    if args.json:
        result = {"model": source.location, "is_expanded": is_expanded, "tasks": results}
        print(json.dumps(result, indent=1, sort_keys=True))
    else:
        print(tasks_table(results))
    return 0


def _plan(args: argparse.Namespace) -> int:
    if run_config(args, args.seqlen or 2048).calibration.whole_text:
        raise ValueError(
            f"--dataset-size {ALL_WINDOWS}: plan reads no text, give the number of windows"
        )
    cluster = cluster_settings(args)
    from sparse_expansion.model.sources import fetch_config, resolve_name

    source = resolve_name(args.model, args.model_size)
    _silence_transformers(args.verbose)
    from sparse_expansion.forecast import Cluster, forecast

    model_config = fetch_config(source, cache_dir=args.cache_dir, revision=args.model_revision)
    config = run_config(args, _seqlen(args, model_config))
    result = forecast(
        config,
        model_config,
        Cluster(**cluster),
        activation_bytes=parse_size(args.activation_memory),
    )
    if args.json:
        print(json.dumps(result, indent=1, sort_keys=True))
    else:
        from sparse_expansion.report import plan_table

        print(plan_table(result))
    return 0


def _run_store(folder: str) -> Any:
    """The store of a run's output folder or URL."""
    from sparse_expansion.store import Store

    if "://" not in folder and not Path(folder).is_dir():
        raise ValueError(f"run folder {folder} does not exist: give a run's --output")
    return Store(folder)


def _check_table(path: str | None) -> None:
    if path is not None and not path.endswith(".parquet"):
        raise ValueError(f"--table {path} must end in .parquet")


def _analyze(args: argparse.Namespace) -> int:
    from sparse_expansion import plots
    from sparse_expansion.report import columns_of, expert_rows, expert_summary, write_table

    check_execution(args)
    _check_table(args.table)
    if args.dataset is not None:
        return _analyze_neurons(args)
    if args.one_cluster is not None or args.dense is not None:
        raise ValueError("--one-cluster and --dense need --dataset: the text to run on")
    rows = expert_rows(_run_store(args.folder))
    if args.table:
        write_table(columns_of(rows), args.table)
    if args.plots:
        plots.save(plots.run_figures(rows), args.plots)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(expert_summary(rows))
    return 0


def _analyze_neurons(args: argparse.Namespace) -> int:
    if args.windows < 1:
        raise ValueError(f"--windows {args.windows} must be at least 1")
    from sparse_expansion.data.corpora import check_dataset, load_corpus
    from sparse_expansion.data.tokenization import encoder, load_tokenizer
    from sparse_expansion.model.sources import fetch_model, resolve_name

    check_dataset(args.dataset)
    source = resolve_name(args.folder)
    _silence_transformers(args.verbose)
    from sparse_expansion import analysis, jobs, plots
    from sparse_expansion.config import CalibrationConfig
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.progress import ProgressLine
    from sparse_expansion.report import neurons_table, write_table
    from sparse_expansion.run_files import RUN_FILE
    from sparse_expansion.store import Store

    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    shell = ModelShell(folder, dtype=args.dtype)
    models = {}
    if shell.expansion is not None:
        models[analysis.EXPANDED] = folder
        dense = args.dense
        if dense is None:
            dense = _run_store(str(folder)).read_json(RUN_FILE)["model"]
        source = resolve_name(dense)
        shell = ModelShell(
            fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision),
            dtype=args.dtype,
        )
    if args.one_cluster is not None:
        other = _run_store(args.one_cluster).local_path().resolve()
        if ModelShell(other).expansion is None:
            raise ValueError(f"{other} is not an expanded model (--one-cluster)")
        models[analysis.ONE_CLUSTER] = other
    seqlen = _seqlen(args, shell.config)
    windows = jobs.evaluation_tokens(
        load_corpus(args.dataset, cache_dir=args.cache_dir).evaluation,
        encoder(load_tokenizer(shell.folder)),
        seqlen=seqlen,
        max_windows=args.windows,
        vocabulary=int(shell.config.vocab_size),
    )
    calibration = CalibrationConfig(
        dataset=args.dataset,
        dataset_size=len(windows),
        seqlen=seqlen,
        seed=args.seed,
        calibration_inputs="dense",
        data_shards=1,
    )
    config = RunConfig(calibration=calibration, dtype=args.dtype)
    line = ProgressLine()
    with tempfile.TemporaryDirectory(prefix="sparse-expansion-", dir=args.scratch) as where:
        executor = _executor(args, store=where, source=source)
        try:
            line.start("analyze", shell.num_blocks)
            table = analysis.describe_neurons(
                shell, windows, models, config, Store(where), executor, line.update
            )
        finally:
            executor.close()
            line.close()
    if args.table:
        write_table(table.columns, args.table)
    if args.plots:
        plots.save(plots.neuron_figures(table.columns), args.plots)
    summary, correlations = table.summary(), table.correlations()
    if args.json:
        result = {"tokens": table.num_tokens, "linears": summary, "correlations": correlations}
        print(json.dumps(result, indent=1))
    else:
        print(neurons_table(summary, correlations, table.num_tokens))
    return 0


def _export(args: argparse.Namespace) -> int:
    folder = _run_store(args.folder).local_path()
    _check_output(args.output)
    _silence_transformers(args.verbose)
    from sparse_expansion.export import export

    result = export(folder, args.output, args.format)
    if args.json:
        print(json.dumps(result, indent=1, sort_keys=True))
    else:
        print(f"{result['format']} model of {result['bytes']:,} bytes in {args.output}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from sparse_expansion.report import run_report
    from sparse_expansion.store import read_allocation, read_timeline, write_file

    store = _run_store(args.folder)
    result, text = run_report(store)
    if args.html is not None:
        from sparse_expansion.page import report_page

        page = report_page(store, result, price_per_hour=args.price)
        write_file(args.html, page.encode())
    if args.plots:
        from sparse_expansion import plots

        figures = plots.run_figures(
            result.get("experts", []), read_timeline(store), read_allocation(store)
        )
        plots.save(figures, args.plots)
    print(json.dumps(result, indent=1, sort_keys=True) if args.json else text)
    return 0


def _experiment(args: argparse.Namespace) -> int:
    check_execution(args)
    _check_table(args.table)
    pattern = experiment_config(args, 1, args.seqlen or 2048).compression.sparsity
    if args.command == "allocate" and args.output and not Path(args.output).parent.is_dir():
        raise ValueError(f"--output {args.output}: {Path(args.output).parent} is no folder")
    if args.command == "allocate" and pattern.group is not None:
        raise ValueError(
            f"--sparsity {pattern}: only a share of zeros can differ by block, e.g. 0.7"
        )
    if args.command == "allocate" and args.eval_windows < 1:
        raise ValueError(f"--eval-windows {args.eval_windows} must be at least 1")
    _asked(args)
    from sparse_expansion.data.corpora import calibration_windows, check_dataset, load_corpus
    from sparse_expansion.data.tokenization import encoder, load_tokenizer
    from sparse_expansion.model.sources import fetch_model, resolve_name

    check_dataset(args.dataset)
    source = resolve_name(args.model, args.model_size)
    _silence_transformers(args.verbose)
    from sparse_expansion import experiments, jobs, plots
    from sparse_expansion.model.streaming import ModelShell
    from sparse_expansion.progress import ProgressLine
    from sparse_expansion.report import columns_of, write_table
    from sparse_expansion.store import Store

    folder = fetch_model(source, cache_dir=args.cache_dir, revision=args.model_revision)
    shell = ModelShell(folder, dtype=args.dtype)
    if shell.expansion is not None:
        raise ValueError(f"{folder} is an expanded model: experiments need the dense one")
    allocating = args.command == "allocate"
    sweeping = args.command == "sweep-clusters"
    if sweeping:
        experiments.mlp_linears(shell, args.layer, args.linear, args.neuron)
    seqlen = _seqlen(args, shell.config)
    corpus = load_corpus(args.dataset, cache_dir=args.cache_dir)
    encode = encoder(load_tokenizer(folder))
    calibration = calibration_windows(
        corpus.calibration,
        encode,
        # An allocation is a choice: it is made on the calibration text alone.
        num_windows=args.dataset_size + allocating * args.eval_windows,
        seqlen=seqlen,
        seed=args.seed,
    )
    vocabulary = int(shell.config.vocab_size)
    jobs.check_vocabulary(calibration, vocabulary)
    if allocating:
        calibration, held = calibration.split((args.dataset_size, args.eval_windows))
    else:
        held = jobs.evaluation_tokens(
            corpus.evaluation,
            encode,
            seqlen=seqlen,
            max_windows=args.eval_windows,
            vocabulary=vocabulary,
        )
    # Held-out text passes through the dense model as calibration text does.
    passing = sweeping or (allocating and args.num_clusters is not None)
    config = experiment_config(args, len(calibration) + passing * len(held), seqlen)
    line = ProgressLine()
    with tempfile.TemporaryDirectory(prefix="sparse-expansion-", dir=args.scratch) as where:
        executor = _executor(args, store=where, source=source)
        shared = {
            "config": config,
            "store": Store(where),
            "executor": executor,
            "observer": line.update,
        }
        work = {
            "sweep-clusters": _sweep_clusters,
            "prune-neurons": _prune_neurons,
            "allocate": _allocate,
        }[args.command]
        try:
            line.start(args.command, shell.num_blocks)
            result, text, figures = work(args, shell, calibration, held, shared)
        finally:
            executor.close()
            line.close()
    if args.table:
        write_table(columns_of(result["rows"]), args.table)
    if args.plots:
        plots.save(figures, args.plots)
    print(json.dumps(result, indent=1) if args.json else text)
    return 0


def _sweep_clusters(
    args: argparse.Namespace, shell: Any, calibration: Any, held: Any, shared: dict[str, Any]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Result, its text, and its figures."""
    import torch

    from sparse_expansion import experiments, plots
    from sparse_expansion.report import sweep_table

    found = experiments.sweep_clusters(
        shell,
        torch.cat([calibration, held]),
        len(calibration),
        layer=args.layer,
        linears=experiments.mlp_linears(shell, args.layer, args.linear, args.neuron),
        clusters=_asked(args)[2],
        neuron=args.neuron,
        **shared,
    )
    figures = plots.sweep_figures(found.rows, found.distributions, args.neuron)
    return {"rows": found.rows}, sweep_table(found.rows, args.neuron), figures


def _prune_neurons(
    args: argparse.Namespace, shell: Any, calibration: Any, held: Any, shared: dict[str, Any]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Result, its text, and its figures."""
    from dataclasses import asdict

    from sparse_expansion import experiments, plots
    from sparse_expansion.report import pruned_table

    rankings, shares, _ = _asked(args)
    found = experiments.prune_neurons(
        shell, calibration, held, rankings=rankings, shares=shares, **shared
    )
    dense = found.perplexity_dense
    text = pruned_table(found.rows, dense, found.num_eval_tokens)
    return asdict(found), text, {"pruned-neurons": plots.perplexity_over_share(found.rows, dense)}


def _allocate(
    args: argparse.Namespace, shell: Any, calibration: Any, held: Any, shared: dict[str, Any]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Result, its text, and its figures."""
    import torch

    from sparse_expansion import allocation, plots
    from sparse_expansion.jobs import model_shape
    from sparse_expansion.report import allocation_table
    from sparse_expansion.store import write_file

    shape = model_shape(shell)
    found = allocation.measure(
        shared["config"],
        shape,
        calibration,
        held,
        executor=shared["executor"],
        observer=shared["observer"],
    )
    clusters = _asked(args)[2]
    if clusters:
        found.errors = allocation.measure_clusters(
            shared["config"],
            shape,
            {name: group.name for group in shell.family.groups for name in group.linears},
            torch.cat([calibration, held]),
            len(calibration),
            clusters=clusters,
            store=shared["store"],
            executor=shared["executor"],
            observer=shared["observer"],
        )
        found.layer_clusters = allocation.clusters_by_error(
            found.gaps, found.errors, args.mean_clusters
        )
    rows = found.rows()
    result = {
        "layer_sparsity": found.layer_sparsity,
        **({"layer_clusters": found.layer_clusters} if clusters else {}),
        "num_eval_tokens": found.num_eval_tokens,
        "rows": rows,
    }
    if args.output:
        write_file(args.output, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())
    return result, allocation_table(rows), {"allocation": plots.allocation(rows)}


def _asked(args: argparse.Namespace) -> tuple[list[str], list[float], list[int]]:
    """Rankings and shares, or numbers of clusters, of an experiment.

    Raises:
        ValueError: one is unknown or out of bounds.
    """
    if args.command in ("sweep-clusters", "allocate"):
        if args.num_clusters is None:
            return [], [], []
        clusters = numbers(args.num_clusters, "--num_clusters", int)
        if min(clusters) < 1:
            raise ValueError(f"--num_clusters {min(clusters)} must be at least 1")
        if args.command == "allocate" and min(clusters) > args.mean_clusters:
            raise ValueError(
                f"--mean-clusters {args.mean_clusters} is below all of --num_clusters "
                f"{args.num_clusters}: try smaller ones too"
            )
        return [], [], clusters
    rankings = list(dict.fromkeys(args.rankings.split(",")))
    unknown = [name for name in rankings if name not in RANKINGS]
    if unknown:
        raise ValueError(f"--rankings {unknown[0]!r} is none of {', '.join(RANKINGS)}")
    shares = numbers(args.shares, "--shares", float)
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"--shares {share:g} is outside 0 to 1, e.g. 0.03")
    return rankings, shares, []


def _compare(args: argparse.Namespace) -> int:
    from sparse_expansion import plots
    from sparse_expansion.report import columns_of, comparison, comparison_table, write_table

    _check_table(args.table)
    rows = comparison([_run_store(folder) for folder in args.folders])
    if args.table:
        write_table(columns_of(rows), args.table)
    if args.plots:
        plots.save({"perplexity-cost": plots.perplexity_against_cost(rows)}, args.plots)
    print(json.dumps(rows, indent=1, sort_keys=True) if args.json else comparison_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
