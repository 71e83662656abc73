"""Judging embeddings and agents: ``compare`` runs a grid, ``report`` shows it, ``recommend`` chooses."""
