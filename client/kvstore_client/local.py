"""The local RPC: protobuf messages as frames on the attach socket.

The calling thread sends its request and reads the answer itself: no hand-over to a reader thread, which would
cost two thread switches a call. With several callers one of them leads: it reads for all, gives every answer to
the one who waits for it, and passes the lead on when it has its own. An answer that nobody waits for is dropped,
so after a missed deadline the stream stays in step.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple

from kvstore.protocol.errors import DeadlineExceeded, InvalidRequest, Unavailable, from_code
from kvstore.protocol.frames import HEADER, MAX_CALLS_IN_FLIGHT, MAX_PAYLOAD_BYTES, Method
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client.rpc import MAP_SLABS, LateHandler, Q, R, Rpc, server_budget_s
from kvstore_client.spin import Spin
from kvstore_client.stream import Answer, AnswerReader, FrameWriter, close_all

_ID_MASK = 0xFFFFFFFF
_DEADLINE_MS_MAX = 0xFFFFFFFF


class _Call:
    """A call in flight. Everything but `late` is guarded by the link's lock."""

    __slots__ = ("answer", "call_id", "fds", "gave_up", "late", "leads", "wake")

    def __init__(self) -> None:
        self.call_id = 0
        self.answer: Answer | None = None
        self.fds: list[int] = []
        self.late: LateHandler | None = None
        self.leads = False
        self.gave_up = False
        self.wake: threading.Lock | None = None  # made, locked, when the caller has to sleep as a follower


class _Deferred(NamedTuple):
    """A request whose answer nobody wants, to be sent with the next call."""

    method: int
    payload: bytes
    call_id: int = 0

    def frame(self) -> bytes:
        """Its bytes."""
        return HEADER.pack(len(self.payload), self.call_id, self.method, 0, 0) + self.payload


_DROPPED = _Call()  # stands for every call whose answer nobody wants
_TURN = Answer(0, 0, 0, b"")


class LocalCall(Generic[R]):
    """A `kvstore_client.rpc.Pending` of the local RPC."""

    __slots__ = ("_call", "_link", "_rpc")

    def __init__(self, link: LocalLink, call: _Call, rpc: Rpc[Any, R]) -> None:
        self._link = link
        self._call = call
        self._rpc = rpc

    @property
    def was_answered(self) -> bool:
        """Whether the daemon has answered in time; see Pending."""
        return self._call.answer is not None and not self._call.gave_up

    def take(self, deadline_s: float) -> R:
        """Take the answer; see Pending."""
        return self._rpc.decode(self._link.answer_of(self._call, deadline_s, may_spin=False).payload)

    def on_late(self, handler: LateHandler) -> None:
        """Call `handler` when the answer comes too late; see Pending."""
        self._call.late = handler


class LocalLink:
    """A `kvstore_client.rpc.Link` over a connected attach socket."""

    keeps_order: ClassVar[bool] = True

    def __init__(self, sock: socket.socket, on_lost: Callable[[str], None]) -> None:
        """Take over a blocking socket.

        Args:
            sock: from connect().
            on_lost: called once with the reason when the connection ends, from whichever thread noticed.
        """
        self.last_sent_s = time.monotonic()
        self._sock = sock
        self._on_lost = on_lost
        self._reader = AnswerReader(sock)
        self._writer = FrameWriter(sock)
        self._lock = threading.Lock()  # guards what follows; held for a few dictionary operations at a time
        self._pending: dict[int, _Call] = {}
        self._last_id = 0
        self._is_led = False
        self._followers: deque[_Call] = deque()
        self._turns: deque[_Call] = deque()  # callers that wait until fewer calls are in flight
        self._lost: str | None = None
        self._is_closed = False
        self._late = 0  # calls whose answer is still to come and will come too late
        self._deferred: deque[_Deferred] = deque()
        self._spin = Spin()  # the leader's

    def fileno(self) -> int:
        """The socket's descriptor, for poll."""
        return self._sock.fileno()

    @property
    def has_late(self) -> bool:
        """Whether answers are still to come that nobody waits for any more."""
        return self._late > 0

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._lost is not None

    # --- the members of a Link

    def call(self, rpc: Rpc[Q, R], request: Q, deadline_s: float, on_late: LateHandler | None = None) -> R:
        """Send a request and return its answer; see Link."""
        call = self._begin(rpc, request, deadline_s)
        call.late = on_late
        return rpc.decode(self.answer_of(call, deadline_s, may_spin=not rpc.is_long).payload)

    def start(self, rpc: Rpc[Q, R], request: Q, deadline_s: float) -> LocalCall[R]:
        """Send a request; see Link."""
        return LocalCall(self, self._begin(rpc, request, deadline_s), rpc)

    def _begin(self, rpc: Rpc[Q, Any], request: Q, deadline_s: float) -> _Call:
        payload = _packed(rpc, request)
        call = _Call()
        while (deferred := self._register(call)) is None:
            self._await_turn(deadline_s)
        budget_ms = min(max(int(server_budget_s(deadline_s - time.monotonic()) * 1000), 1), _DEADLINE_MS_MAX)
        frame = HEADER.pack(len(payload), call.call_id, rpc.method, 0, budget_ms) + payload
        if not self._send(deferred, frame, deadline_s):
            self._forget(call.call_id)
            raise DeadlineExceeded("the daemon does not take what this client sends")
        return call

    @property
    def has_deferred(self) -> bool:
        """Whether requests wait to be sent; see Link."""
        return bool(self._deferred)

    def defer(self, rpc: Rpc[Q, Any], request: Q) -> None:
        """Send a request with the next call; see Link. Takes no lock: a finalizer may be the caller."""
        self._deferred.append(_Deferred(rpc.method, _packed(rpc, request)))

    def flush(self) -> None:
        """Send what was deferred; see Link."""
        self.pump()
        with self._lock:
            deferred = self._take_deferred()
        if deferred:
            with contextlib.suppress(Unavailable):  # the next call will say so
                self._send(deferred, b"", 0.0)

    def pump(self) -> None:
        """Take in answers that have arrived; see Link."""
        nobody = _Call()
        with self._lock:
            if self._is_led or self._lost is not None:
                return
            self._is_led = nobody.leads = True
        try:
            self._read_until(nobody, 0.0, may_spin=False)
        finally:
            self._step_down(nobody)

    def close(self) -> None:
        """Close the connection and fail every call in flight; see Link."""
        self._fail("this client closed the connection")

    def abandon(self) -> None:
        """Close the descriptors in a forked child. No lock is taken: a thread of the parent may have held it."""
        self._lost = "the process forked"
        self._reader.close()
        self._sock.close()

    # --- what only the attach socket can do

    def map_slabs(self, request: pb.MapSlabsRequest, deadline_s: float) -> tuple[pb.MapSlabsResponse, list[int]]:
        """Call MapSlabs; returns its answer and one descriptor for each slab in it, which the caller owns.

        Raises:
            Unavailable: also when descriptors are missing, because this process has too many open files.
        """
        call = self._begin(MAP_SLABS, request, deadline_s)
        try:
            reply = MAP_SLABS.decode(self.answer_of(call, deadline_s, may_spin=True).payload)
            if len(call.fds) != len(reply.slabs):
                raise Unavailable(f"{len(call.fds)} descriptors came for {len(reply.slabs)} slabs")
        except BaseException:
            close_all(call.fds)
            raise
        return reply, call.fds

    def check_peer(self) -> None:
        """Notice now if the daemon has closed the connection: the end comes after the last answer."""
        self.pump()

    # --- calls in flight

    def _register(self, call: _Call) -> list[_Deferred] | None:
        """Give the call its id and return what goes before it; None if too many calls are in flight."""
        with self._lock:
            if self._lost is not None:
                raise Unavailable(self._lost)
            if len(self._pending) >= MAX_CALLS_IN_FLIGHT:
                return None
            call.call_id = self._new_id()
            self._pending[call.call_id] = call
            return self._take_deferred()

    def _take_deferred(self) -> list[_Deferred]:
        """Take deferred requests, as many as may be in flight, and give them ids. Holds the lock."""
        taken: list[_Deferred] = []
        while self._deferred and len(self._pending) < MAX_CALLS_IN_FLIGHT:
            request = self._deferred.popleft()._replace(call_id=self._new_id())
            self._pending[request.call_id] = _DROPPED
            taken.append(request)
        return taken

    def _send(self, deferred: list[_Deferred], frame: bytes, deadline_s: float) -> bool:
        """Send deferred requests and a frame in one piece; False if nothing of it went."""
        self.last_sent_s = time.monotonic()
        if deferred:
            frame = b"".join([request.frame() for request in deferred]) + frame
        try:
            went = self._writer.send(frame, deadline_s)
        except Unavailable as error:
            self._fail(str(error))
            raise
        if not went:
            with self._lock:
                for request in reversed(deferred):
                    self._pending.pop(request.call_id, None)
                    self._deferred.appendleft(request)
        return went

    def _new_id(self) -> int:
        while True:
            self._last_id = (self._last_id + 1) & _ID_MASK
            if self._last_id not in self._pending:
                return self._last_id

    def _forget(self, call_id: int) -> None:
        """Give up a call that was never sent."""
        with self._lock:
            self._pending.pop(call_id, None)
            self._grant_turn()

    def _grant_turn(self) -> None:
        if self._turns:
            _settle(self._turns.popleft(), _TURN)

    def _await_turn(self, deadline_s: float) -> None:
        """Wait until fewer calls are in flight."""
        turn = _Call()
        with self._lock:
            if len(self._pending) < MAX_CALLS_IN_FLIGHT:
                return
            self._turns.append(turn)
        try:
            self._await(turn, deadline_s, may_spin=False)
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._turns.remove(turn)
        if turn.answer is None:
            raise DeadlineExceeded(f"{MAX_CALLS_IN_FLIGHT} calls of this client are waiting for the daemon")

    def answer_of(self, call: _Call, deadline_s: float, *, may_spin: bool) -> Answer:
        """Take the answer of a call, as call() does."""
        try:
            if call.answer is None:
                self._await(call, deadline_s, may_spin)
        finally:
            if call.answer is None:
                with self._lock:
                    call.gave_up = call.answer is None
                    self._late += call.gave_up
        answer = call.answer
        if answer is None:
            raise DeadlineExceeded("the daemon did not answer in time")
        if answer.status:
            raise from_code(answer.status, answer.payload.decode("utf-8", "replace"))
        return answer

    # --- leading and following

    def _await(self, call: _Call, deadline_s: float, may_spin: bool) -> None:
        """Return when the call has its answer or the deadline has passed."""
        with self._lock:
            if call.answer is not None:
                return
            if self._is_led:
                call.wake = threading.Lock()
                call.wake.acquire()
                self._followers.append(call)
            else:
                self._is_led = call.leads = True
        try:
            if call.wake is not None:
                call.wake.acquire(timeout=max(deadline_s - time.monotonic(), 0))
            if call.leads:
                self._read_until(call, deadline_s, may_spin)
        finally:
            self._step_down(call)

    def _step_down(self, call: _Call) -> None:
        """Stop leading or following; a leader names its heir."""
        with self._lock:
            if call.wake is not None:
                with contextlib.suppress(ValueError):
                    self._followers.remove(call)
            if not call.leads:
                return
            call.leads = False
            while self._followers:
                heir = self._followers.popleft()
                if heir.answer is None:
                    heir.leads = True
                    _wake(heir)
                    return
            self._is_led = False
            closes = self._lost is not None and not self._is_closed
            self._is_closed |= closes
        if closes:
            self._close()

    def _read_until(self, call: _Call, deadline_s: float, may_spin: bool) -> None:
        """As leader: read and deal out answers until this call has its own, or the deadline."""
        reader = self._reader
        spin_until_s = self._spin.begin() if may_spin else 0.0
        try:
            while call.answer is None:
                answer = reader.pop()
                if answer is not None:
                    self._deal(answer)
                    continue
                now = time.monotonic()
                if now < spin_until_s:
                    reader.fill(0)
                elif not reader.fill(deadline_s - now) and time.monotonic() >= deadline_s:
                    return
        except Unavailable as error:
            self._fail(str(error))
        finally:
            if spin_until_s:
                self._spin.end(was_answered=time.monotonic() < spin_until_s)

    def _deal(self, answer: Answer) -> None:
        """Give an answer to the one who waits for it."""
        fds: list[int] = []
        if answer.method == Method.MAP_SLABS:
            fds, self._reader.fds = self._reader.fds, fds
        with self._lock:
            call = self._pending.pop(answer.call_id, _DROPPED)
            is_late = call.gave_up
            self._late -= is_late
            if call is not _DROPPED:
                if not is_late:
                    call.fds, fds = fds, []
                _settle(call, answer)
            self._grant_turn()
        close_all(fds)
        if is_late and call.late is not None:
            call.late(None if answer.status else answer.payload)

    # --- the end

    def _fail(self, reason: str) -> None:
        """End the connection and answer every call in flight with Unavailable; only the first reason counts."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = reason
            answer = Answer(0, 0, Unavailable.code, reason.encode())
            for call in (*self._pending.values(), *self._turns):
                if call is not _DROPPED:
                    _settle(call, answer)
            self._pending.clear()
            closes = not self._is_led
            self._is_closed = closes
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the leader out of its read
        if closes:
            self._close()
        self._on_lost(reason)

    def _close(self) -> None:
        self._writer.close()
        self._reader.close()


def _settle(call: _Call, answer: Answer) -> None:
    call.answer = answer
    _wake(call)


def _wake(call: _Call) -> None:
    if call.wake is not None and call.wake.locked():
        call.wake.release()


def _packed(rpc: Rpc[Q, Any], request: Q) -> bytes:
    payload = request.SerializeToString()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest(
            f"{rpc.name} takes {len(payload)} bytes; the limit is {MAX_PAYLOAD_BYTES}: ask for fewer keys at once"
        )
    return payload
