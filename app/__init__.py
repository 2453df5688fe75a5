"""The service: recipe → sources → plan → queue → artifact. Nothing here imports torch or the worker."""

__version__ = "0.1.0"
