"""Dashboards, alert rules and runbooks for a fleet, written from one table of alerts; not part of the package."""
