"""A TCP relay that can be cut: stands between two control planes."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading


class Relay:
    """Forwards each connection to a target until :meth:`cut`.

    Attributes:
        address: "tcp://127.0.0.1:port" to connect to.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kvlink-test-relay", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ, None)
        selector.register(self._wake_read, selectors.EVENT_READ, None)
        with selector:
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._wake_read:
                        return
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._forward(selector, key.fileobj, key.data)  # type: ignore[arg-type]

    def _accept(self, selector: selectors.BaseSelector) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._sockets += [client, server]
        selector.register(client, selectors.EVENT_READ, server)
        selector.register(server, selectors.EVENT_READ, client)

    def _forward(self, selector: selectors.BaseSelector, source: socket.socket, sink: socket.socket) -> None:
        try:
            data = source.recv(65_536)
            if data:
                sink.sendall(data)
                return
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(KeyError, ValueError):
                selector.unregister(end)
            _reset(end)

    def cut(self, *, hard: bool = True) -> None:
        """Ends every connection and listens no more.

        Args:
            hard: With a reset, as when a machine says that it knows no such connection; else with an orderly end.
        """
        if self._stopped:
            return
        self._stopped = True
        self._wake_write.send(b"x")
        self._thread.join(10)
        for end in self._sockets:
            if hard:
                _reset(end)
            else:
                end.close()
        for own in (self._listener, self._wake_read, self._wake_write):
            own.close()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
