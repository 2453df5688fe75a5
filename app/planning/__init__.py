"""Recipe + sources → plan."""
