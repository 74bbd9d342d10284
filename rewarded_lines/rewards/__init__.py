"""Rewards: classifiers and functions under one protocol, and a cache of their scores."""
