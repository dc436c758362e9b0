"""A process of the same service that somebody forgot to watch: it has metrics, but none of ours."""

from prometheus_client import CollectorRegistry, make_asgi_app

app = make_asgi_app(CollectorRegistry())
