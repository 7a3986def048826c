"""LMCache's transfer channel context on a kvlink channel: the server's memory, its peers and reads from them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from lmcache.logging import init_logger
from lmcache.v1.distributed.transfer_channel.abstract import (
    TransferChannelClient,
    TransferChannelContext,
    TransferChannelServer,
)
from lmcache.v1.distributed.transfer_channel.api import TransferChannelAddress, TransferChannelReadResult

import kvlink
from kvlink.errors import KvlinkError

from ..endpoint import REGION, Endpoint
from ..log import get_logger

_log = get_logger()
CONNECT_SECONDS = 30.0
READ_SECONDS = 30.0


class KVLinkTransferChannelServer(TransferChannelServer):  # type: ignore[misc]
    """Stands for the channel's listener, which lives as long as the context."""

    def __init__(self, listen_url: str, advertise_url: str, l1_memory_desc: Any) -> None:
        """Remembers what it serves; the context has opened the listener.

        Args:
            listen_url: "host:port" that is bound.
            advertise_url: "host:port" that peers use.
            l1_memory_desc: What they can read.
        """
        self.listen_url = listen_url
        self.advertise_url = advertise_url
        self.l1_memory_desc = l1_memory_desc

    def close(self) -> None:
        """Nothing of its own; the context closes the channel."""


class KVLinkTransferChannelClient(TransferChannelClient):  # type: ignore[misc]
    """Reads from one peer. Thread-safe.

    Attributes:
        peer: The connection.
    """

    def __init__(self, endpoint: Endpoint, peer: kvlink.Peer) -> None:
        """Takes a connected peer.

        Args:
            endpoint: The channel.
            peer: Whom to read from.
        """
        self._endpoint = endpoint
        self.peer = peer
        self._ids = itertools.count()
        self._tasks: dict[int, tuple[kvlink.Transfer | None, int]] = {}
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether the connection stands."""
        return self.peer.error is None

    def submit_read(self, local_addresses: Sequence[Any], remote_addresses: Sequence[Any]) -> int:
        """Starts to read; never blocks.

        Args:
            local_addresses: Where to, in this server's memory.
            remote_addresses: Where from, in the peer's; as many, each of the same size.

        Returns:
            A number for :meth:`query_read_status`.

        Raises:
            ValueError: The two do not pair. A peer that is gone is no error here; the status says so.
        """
        if len(local_addresses) != len(remote_addresses):
            raise ValueError(
                f"{len(local_addresses)} local addresses do not pair with {len(remote_addresses)} remote ones"
            )
        count = len(local_addresses)
        table = np.empty((count, 3), dtype=np.int64)
        table[:, 0] = [address.offset for address in local_addresses]
        table[:, 1] = [address.offset for address in remote_addresses]
        table[:, 2] = [address.size for address in remote_addresses]
        for index, address in enumerate(local_addresses):
            if address.size != remote_addresses[index].size:
                sizes = f"{address.size} bytes here and {remote_addresses[index].size} there"
                raise ValueError(f"address {index} has {sizes}; both must be equal")
        transfer: kvlink.Transfer | None = None
        try:
            blocks = kvlink.ranges(self._endpoint.region, self.peer.regions[REGION], table)
            transfer = self.peer.get(blocks, timeout=self._endpoint.transfer_timeout)
        except (KvlinkError, KeyError) as error:
            _log.warning("reading %d objects from %s: %s", count, self.peer.address, error)
        with self._lock:
            task = next(self._ids)
            self._tasks[task] = (transfer, count)
        return task

    def query_read_status(self, task_id: int) -> Any:
        """Returns how a read stands; a finished one is forgotten.

        Args:
            task_id: From :meth:`submit_read`.

        Raises:
            KeyError: No such read, or it was reported as finished before.
        """
        with self._lock:
            if task_id not in self._tasks:
                raise KeyError(f"unknown read {task_id}: never submitted, or reported as finished before")
            transfer, count = self._tasks[task_id]
            if transfer is not None and not transfer.done():
                return TransferChannelReadResult(finished=False, succeeded_mask=[])
            del self._tasks[task_id]
        good = False
        if transfer is not None:
            try:
                transfer.wait()
                self._endpoint.trace("get", self.peer, transfer)
                good = True
            except KvlinkError as error:
                _log.warning("reading %d objects from %s failed: %s", count, self.peer.address, error)
        return TransferChannelReadResult(finished=True, succeeded_mask=[good] * count)

    def close(self) -> None:
        """Stops what is under way and returns when nothing is written any more. Idempotent."""
        with self._lock:
            tasks, self._tasks = list(self._tasks.values()), {}
        for transfer, _ in tasks:
            if transfer is not None:
                transfer.cancel()
        for transfer, _ in tasks:
            if transfer is not None:
                try:
                    transfer.wait()
                except KvlinkError as error:
                    _log.debug("a stopped read ended: %s", error)


class KVLinkTransferChannelContext(TransferChannelContext):  # type: ignore[misc]
    """A server's channel: its memory is one region that peers may read, never write.

    Attributes:
        advertise_url: "host:port" by which peers know this server.
    """

    def __init__(
        self,
        l1_memory_desc: Any,
        listen_url: str,
        advertise_url: str,
        transfer_channel: str = "auto",
        **extra: Any,
    ) -> None:
        """Opens the channel and registers the memory.

        Args:
            l1_memory_desc: Pointer, bytes and alignment of LMCache's memory.
            listen_url: "host:port" to bind.
            advertise_url: "host:port" that peers connect to.
            transfer_channel: "kvlink" or "auto" for the best usable provider, or its name.
            extra: Keywords for other implementations, such as NIXL's ``backends``; not used.

        Raises:
            ConfigError: A wrong address or option, or no secret beyond loopback.
            ChannelUnavailableError: This host cannot use the provider.
        """
        # In this process nobody has set up vLLM's logger, on which kvlink's hangs otherwise.
        _log.parent = init_logger("lmcache.kvlink")
        self._desc = l1_memory_desc
        self.advertise_url = _bare(advertise_url)
        name = "auto" if transfer_channel == "kvlink" else transfer_channel
        config = kvlink.ChannelConfig.from_env(
            base={
                "transfer_channel": name,
                "listen": f"tcp://{_bare(listen_url)}",
                "advertise": f"tcp://{self.advertise_url}",
            }
        )
        channel = kvlink.open_from_config(config)
        try:
            region = channel.register(
                (int(l1_memory_desc.ptr), int(l1_memory_desc.size), "cpu"), name=REGION, access="r"
            )
            self._endpoint = Endpoint(
                channel,
                region,
                int(l1_memory_desc.align_bytes),
                connect_timeout=CONNECT_SECONDS,
                transfer_timeout=READ_SECONDS,
            )
        except BaseException:
            channel.close()
            raise
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._server = KVLinkTransferChannelServer(listen_url, advertise_url, l1_memory_desc)
        self._endpoint.on_greeting = self._greeted
        _log.info("channel %s for LMCache's server at %s: %d bytes", channel.name, self.advertise_url, region.nbytes)

    def get_transfer_channel_server(self) -> KVLinkTransferChannelServer:
        """Returns the one server."""
        return self._server

    def get_transfer_channel_client(self, peer_advertise_url: str) -> Any:
        """Returns the client of a peer, connecting when there is none or its connection is lost.

        Args:
            peer_advertise_url: "host:port" of the peer.

        Raises:
            ConnectError: It cannot be reached in time, or refuses.
        """
        key = _bare(peer_advertise_url)
        with self._lock:
            client = self._clients.get(key)
        if client is not None and getattr(client, "alive", True):
            return client
        if client is not None:
            self.remove_transfer_channel_client(key)
        self._endpoint.connect(self.advertise_url, key, key)
        return self.register_client(key, KVLinkTransferChannelClient(self._endpoint, self._endpoint.peer(key)))

    def register_client(self, key: str, client: Any) -> Any:
        """Notes a peer's client, unless there is one; the one too many is closed.

        Args:
            key: "host:port" of the peer.
            client: Its client.

        Returns:
            The client that counts.
        """
        with self._lock:
            first = self._clients.get(key)
            if first is None or not getattr(first, "alive", True):
                self._clients[key] = client
                first, client = client, first
        if client is not None and client is not first:
            client.close()
        return first

    def _greeted(self, peer_id: str, peer: kvlink.Peer) -> None:
        """A peer has connected: reads from it are possible too."""
        self.register_client(peer_id, KVLinkTransferChannelClient(self._endpoint, peer))

    def remove_transfer_channel_client(self, peer_advertise_url: str) -> None:
        """Ends the reads from a peer; nothing where there is no client.

        Args:
            peer_advertise_url: "host:port" of the peer.
        """
        with self._lock:
            client = self._clients.pop(_bare(peer_advertise_url), None)
        if client is not None:
            client.close()

    def get_transfer_channel_address(self, lmcache_addresses: Sequence[tuple[int, int]]) -> list[Any]:
        """Converts LMCache's addresses.

        Args:
            lmcache_addresses: (offset, bytes) in this server's memory.

        Raises:
            ValueError: One is outside of it.
        """
        size = int(self._desc.size)
        for offset, nbytes in lmcache_addresses:
            if offset < 0 or nbytes <= 0 or offset + nbytes > size:
                raise ValueError(f"object at {offset} of {nbytes} bytes is outside the registered {size} bytes")
        return [TransferChannelAddress(offset=offset, size=nbytes) for offset, nbytes in lmcache_addresses]

    def get_num_connected_clients(self) -> int:
        """Returns how many peers have a client here."""
        with self._lock:
            return len(self._clients)

    def close(self) -> None:
        """Ends reads, connections and the listener; the memory may be freed afterwards. Idempotent."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()
        self._server.close()
        self._endpoint.close()


def _bare(url: str) -> str:
    """Returns "host:port" of a URL with or without "tcp://"."""
    return url.split("://", 1)[-1].rstrip("/")
