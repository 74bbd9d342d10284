"""What a run adds to a model card, and uploads to the Hub."""
