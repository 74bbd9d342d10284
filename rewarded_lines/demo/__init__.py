"""The whole job on an embedded default: a corpus of movie reviews, and the pipeline over the recipes."""
