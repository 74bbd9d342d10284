"""Long jobs in parts: recipes as child processes, what of a job is finished, rounds of training and merging."""
