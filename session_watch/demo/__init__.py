"""A small shop on embedded SQLite in which sessions are handled in every right and every wrong way."""
