"""Optimizers, losses and learning rate schedules, each with a table that a recipe chooses from by name."""
