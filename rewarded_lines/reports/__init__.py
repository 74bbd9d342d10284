"""From the records of runs to numbers with intervals, tables, figures and one HTML page."""
