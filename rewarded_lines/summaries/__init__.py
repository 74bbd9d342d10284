"""From the records of runs to numbers with intervals, and to tables of them. No files are written here."""
