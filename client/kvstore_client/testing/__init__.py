"""A daemon in this process, for tests of code that uses `kvstore_client`.

    from kvstore_client import Client
    from kvstore_client.testing import FakeDaemon

    with FakeDaemon() as daemon, Client(daemon.address) as client:
        ...
        daemon.die()        # what does your code do now?

It listens on a real attach socket and serves real shared memory, so that the real Client runs against it
unmodified; its store is a dictionary. It is no cache: it evicts nothing by itself and keeps nothing on disk.
"""

from kvstore_client.testing.daemon import FakeDaemon

__all__ = ["FakeDaemon"]
