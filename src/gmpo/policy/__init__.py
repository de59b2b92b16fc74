"""The policy: models by name, and log-probabilities of given tokens."""
