"""Weights that lie in no file and are made when they are read."""
