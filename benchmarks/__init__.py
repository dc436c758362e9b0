"""What a watched request costs more than an unwatched one, in time and in instructions."""
