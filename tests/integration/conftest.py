"""Real daemons and workers."""

from daemon_fixtures import served, start_daemon, start_worker, transport
from remote_fixtures import certificates, remote_served, start_remote

__all__ = ["certificates", "remote_served", "served", "start_daemon", "start_remote", "start_worker", "transport"]
