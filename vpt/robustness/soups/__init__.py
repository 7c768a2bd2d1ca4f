"""Means of the weights of several runs: what a mean is, who may be averaged, and which runs are taken where."""
