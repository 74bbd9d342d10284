"""The demo: train, merge and measure on movie reviews, through the recipes."""
