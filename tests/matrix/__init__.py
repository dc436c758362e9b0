"""``make matrix``: the tests under old and new versions of Python and of what we depend on."""
