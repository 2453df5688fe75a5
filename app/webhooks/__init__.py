"""Webhooks: telling somebody's server that a merge has ended."""
