"""Serving engines from within: each loads straight from a training checkpoint, through the engine's own door.

Nothing here is imported by the package itself; an engine's plug-in mechanism does it.
"""
