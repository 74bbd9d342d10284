"""The whole job on an embedded default: the corpus of movie reviews and the pipeline over the recipes."""
