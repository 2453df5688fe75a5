"""Validation tasks: what a merged model is asked, what it should say, and how that is judged. No torch."""
