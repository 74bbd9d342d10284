"""The page of a report: one HTML file with a run's fronts and every response."""
