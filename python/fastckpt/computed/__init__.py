"""Weights that lie in no file and are computed when they are read."""
