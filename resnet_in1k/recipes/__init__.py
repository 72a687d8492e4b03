"""What a run computes: the recipe, the named recipes, and the arithmetic of epochs and steps."""
