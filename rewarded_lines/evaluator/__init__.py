"""The verbs that evaluate: sweep, search, tune, score, choose; their points, records, run folders and Ray workers."""
