"""How the neurons of a linear can be ranked."""

RANKINGS = ("wasserstein", "mean", "variance", "magnitude", "random")
