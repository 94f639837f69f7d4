"""Load an expanded folder as any user of transformers would, and continue a prompt.

python benchmarks/generate.py FOLDER PROMPT
"""

from __future__ import annotations

import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import sparse_expansion  # noqa: F401 - registers the quantization method


def main(folder: str, prompt: str) -> None:
    """Print the continuation and the time per new token."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    seconds = time.perf_counter() - start
    new = output.shape[1] - inputs["input_ids"].shape[1]
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(f"({new} tokens in {seconds:.1f} s)")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
