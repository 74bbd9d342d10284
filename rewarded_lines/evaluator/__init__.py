"""The verbs that evaluate, with their points, records, run folders and Ray workers."""
