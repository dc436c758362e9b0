"""The live page: who holds which connection now, and what was found; for people with the token, and nobody else."""
