"""A model is loaded and used with PyTorch, transformers, safetensors and NumPy alone."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
NOT_NEEDED = (
    "accelerate datasets gguf jinja2 llvmlite matplotlib numba pandas pyarrow ray rich scipy "
    "sentencepiece sklearn threadpoolctl xxhash"
)
PROGRAM = """
import sys

folder, missing = sys.argv[1], set(sys.argv[2:])


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch

import sparse_expansion
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)
found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
print(*found[0].tolist())
assert not missing & {name.partition(".")[0] for name in sys.modules}
"""


def test_it_runs_without_what_only_making_models_needs(expanded):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(expanded), *NOT_NEEDED.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(expanded)
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    assert done.stdout.split() == [str(token) for token in wanted[0].tolist()]
