"""Requests in, completions out; used by training, evaluation and serving alike."""
