"""Real daemons and workers."""

from daemon_fixtures import served, start_daemon, start_worker, transport
from remote_fixtures import certificates, start_remote

__all__ = ["certificates", "served", "start_daemon", "start_remote", "start_worker", "transport"]
