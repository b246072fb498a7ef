"""PiSSA surgery on checkpoints: numerics and streaming; knows no web and no queue."""

__version__ = "0.1.0"
