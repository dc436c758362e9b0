"""The tests of session_watch; servers and databases they need start by themselves."""
