"""The objective inside other trainers: the one place that imports them; nothing imports it."""
