"""Which connection a session token stands for."""

from __future__ import annotations

from kvstore.protocol.errors import Unauthenticated
from kvstore.transport.connection import Connection
from kvstore.transport.engine import SessionView

_TOKEN_BYTES = 32


class SessionRegistry:
    """Tokens of the living sessions. Its operations are single dict operations, so it needs no lock."""

    def __init__(self) -> None:
        self._by_token: dict[bytes, Connection] = {}

    def __len__(self) -> int:
        return len(self._by_token)

    def add(self, token: bytes, connection: Connection) -> None:
        """A session began."""
        self._by_token[token] = connection

    def remove(self, token: bytes) -> None:
        """A session ended; its token is worth nothing from now on."""
        self._by_token.pop(token, None)

    def find(self, text: str | bytes | None) -> tuple[Connection, SessionView]:
        """The connection and session that a token in hex stands for.

        Raises:
            Unauthenticated: there is no token, or none of ours.
        """
        if text is None:
            raise Unauthenticated("no session token: attach first and send it as metadata kvstore-token, in hex")
        try:
            token = bytes.fromhex(text if isinstance(text, str) else text.decode("ascii"))
        except (ValueError, UnicodeDecodeError):
            token = b""
        connection = self._by_token.get(token) if len(token) == _TOKEN_BYTES else None
        if connection is None or connection.session is None:
            raise Unauthenticated("the session token is unknown: the session has ended, or this daemon did not give it")
        return connection, connection.session
