"""Optimizers, losses and learning-rate schedules, each with a registry that a recipe chooses from by name."""
