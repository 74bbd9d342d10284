"""Rewards: classifiers and functions behind one declaration, and scores that are computed once."""
