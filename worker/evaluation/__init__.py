"""Scoring a model on tasks. Needs transformers (the extra ``evaluation``)."""
