"""Other projects' own test suites, run without session_watch and with it."""
