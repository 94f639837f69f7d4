"""One block of real size, expanded for real: Llama 2 13B's or Pythia 12B's, random weights.

    python -m benchmarks.real_size llama
    python -m benchmarks.real_size pythia

16 experts at 50 %, in bfloat16, one expert per unit. Prints seconds by stage and peak memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.synthetic import command, save_model

SHAPES = {
    "llama": ("llama", {"intermediate_size": 13824}),
    "pythia": ("gpt_neox", {"intermediate_size": 20480}),
}


def main() -> None:
    """Print what `plan` foretold and what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--scratch", help="folder for model and result (7 GB)")
    args = parser.parse_args()
    model_type, sizes = SHAPES[args.shape]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        model = save_model(
            Path(folder) / "model",
            model_type,
            torch.bfloat16,
            hidden_size=5120,
            num_hidden_layers=1,
            num_attention_heads=40,
            max_position_embeddings=args.seqlen,
            **sizes,
        )
        flags = f"--dataset-size {args.windows} --seqlen {args.seqlen} --experts-per-unit 1 "
        flags += f"--preset paper --num_clusters {args.clusters} --calibration-inputs dense "
        flags += "--min-tokens-per-expert 0 --activation-memory 1GiB"
        plan = command("plan", "--model", model, *flags.split())
        output = Path(folder) / "out"
        where = ["--model", model, "--dataset", "pydoc", "--output", output]
        found = command("expand", *where, *flags.split())
    print(f"shape                {args.shape}: 5120 x {sizes['intermediate_size']}")
    print(f"tokens, experts      {args.windows * args.seqlen}, {args.clusters}")
    print(f"seconds              {found['seconds']['expand']:.0f}")
    for stage, seconds in sorted(found["unit_seconds"].items()):
        print(f"  {stage:<18} {seconds:.0f}")
    print(f"peak memory          {found['peak_memory_bytes'] / 1e9:.1f} GB")
    print(f"  plan               {plan['memory_bytes']['peak'] / 1e9:.1f} GB")
    print(f"checkpoint           {found['checkpoint_bytes'] / 1e9:.2f} GB")
    print(json.dumps({"shape": args.shape, "plan": plan["memory_bytes"], "metrics": found}))


if __name__ == "__main__":
    main()
