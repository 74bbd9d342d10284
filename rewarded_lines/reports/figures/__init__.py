"""Figures of fronts, simplices, depth and training. They need matplotlib."""
