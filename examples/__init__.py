"""The article's scenario made real: two adapters of one small language model, merged through the service."""
