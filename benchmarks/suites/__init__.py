"""Test suites as people write them, for what the pytest plugin costs."""
