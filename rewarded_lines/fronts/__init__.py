"""Pareto fronts: pure numbers in, numbers out."""
