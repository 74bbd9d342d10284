"""What a person looks at on paper: figures of fronts, simplices, depth and training. Needs matplotlib."""
