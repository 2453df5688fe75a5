"""Files that are somewhere else: what is here of them, and how the rest comes."""
