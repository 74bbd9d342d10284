"""What the recipes share: arguments, corpora, and any reward as a module for TRL."""
