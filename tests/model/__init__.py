"""Session lives at random, next to an oracle that knows the truth from the database, the pool and the script."""
