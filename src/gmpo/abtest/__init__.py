"""Two models on split traffic: who is assigned what, what it shows, and what to do about it."""
