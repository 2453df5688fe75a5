"""Sweeps: one recipe over a grid of parameters, each point scored on tasks. No torch."""
