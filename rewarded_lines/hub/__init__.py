"""The scores of a run on model cards, and uploads to the Hub."""
