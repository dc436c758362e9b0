"""Suites that other tests run: as people write them, with what they use. They are not collected by themselves."""
