"""The page of a report: one HTML file with fronts and responses."""
