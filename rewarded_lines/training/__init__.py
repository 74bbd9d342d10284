"""What makes a script of training a recipe: arguments, the run and its folder, its place in the project."""
