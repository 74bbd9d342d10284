"""The verbs that evaluate a project: a sweep along λ, its tuning, the search for more points, one model alone."""
