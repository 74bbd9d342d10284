"""The page of a report: one HTML file that holds a run's fronts and every response. Nothing here writes files."""
