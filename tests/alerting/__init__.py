"""Alert rules and dashboards against the real Prometheus and Alertmanager."""
