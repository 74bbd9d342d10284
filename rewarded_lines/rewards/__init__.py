"""Rewards: classifiers and functions behind one declaration, and a cache of their scores."""
