"""The schema's history. ``Database.migrate`` runs it; ``mergeyard migrate`` calls that."""
