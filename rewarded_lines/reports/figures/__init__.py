"""Figures of fronts, simplices, depth and training; drawing needs matplotlib."""
