"""Pareto fronts: hypervolume, bootstrap, choice, the next point. Numbers in, numbers out."""
