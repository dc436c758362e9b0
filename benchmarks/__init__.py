"""What a watched request costs more than an unwatched one, in time and in instructions."""

import benchmarks.layout  # noqa: F401  # before anything else is imported, which it moves
