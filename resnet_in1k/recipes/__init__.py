"""The recipe of a run, published recipes, and the arithmetic of epochs, steps and batches."""
