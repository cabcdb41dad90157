"""Targets become rows, batches and files: what will be done, before a byte is read."""
