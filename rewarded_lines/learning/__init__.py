"""Models that are trained and what trains them: any causal language model, one from nothing, PPO with what it lacks."""
