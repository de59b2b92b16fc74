"""The objective inside other trainers; the only place that imports them, and imported by nothing."""
