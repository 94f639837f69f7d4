"""What the tests of studies share: the commands on tiny settings, and what enters a linear."""

import torch

from sparse_expansion.cli import main
from sparse_expansion.data.activations import GroupInputs
from sparse_expansion.model.streaming import ModelShell

ON = "--dataset-size 40 --eval-windows 6 --seqlen 48 --block-size 16 --threads 1".split()
SWEEP = "--layer 1 --sparsity 0.8 --PCA_reduction_factor 4 --num_clusters 1,4".split()


def sweep(model, text, *flags):
    where = ["--model", str(model), "--dataset", str(text)]
    return main(["sweep-clusters", *where, *ON, *SWEEP, *flags])


def prune(model, text, *flags):
    where = ["--model", str(model), "--dataset", str(text), "--sparsity", "0.9"]
    return main(["prune-neurons", *where, *ON, *flags])


def block_inputs(folder, tokens, layer, group):
    """The dense block and what enters a group of its linears."""
    shell = ModelShell(folder)
    hidden = shell.embed(tokens)
    with torch.no_grad():
        for number in range(layer + 1):
            block = shell.load_block(number)
            with GroupInputs(block, shell.family.groups) as seen:
                hidden = shell.call(number, tokens).run(block, hidden)
    return block, seen.inputs[group]
