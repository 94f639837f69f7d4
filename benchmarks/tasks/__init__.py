"""Tasks of lm-evaluation-harness that need no network, and models' scores on them."""
