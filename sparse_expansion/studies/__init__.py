"""Studies of a dense model: what its neurons do, how many clusters it needs, what bears pruning."""
