"""Real daemons and workers."""

from daemon_fixtures import served, start_daemon, start_worker, transport

__all__ = ["served", "start_daemon", "start_worker", "transport"]
