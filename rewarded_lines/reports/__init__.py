"""Reports of runs: numbers with intervals, tables, figures and one HTML page."""
