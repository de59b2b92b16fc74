"""Comparisons and measurements of speed and memory, each runnable by itself."""
