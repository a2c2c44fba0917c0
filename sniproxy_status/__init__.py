"""Reads a status socket, and shows what was counted: to people, as JSON, or to Prometheus.

- `reading`: what the service says, checked, and added up where several processes say it.
- `table`, `prometheus`: how it is shown.
"""
