"""The multiprocess server's transfer channel on kvlink: registration, reads, peers that come and go."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache.v1.distributed.transfer_channel.factory")

from lmcache.v1.distributed.internal_api import L1MemoryDesc  # noqa: E402
from lmcache_pools import free_port  # noqa: E402

from kvlink_lmcache.mp import create  # noqa: E402

SIZE, ALIGN = 1 << 16, 256


class Server:
    """Memory and a context."""

    def __init__(self, port: int = 0) -> None:
        self.memory = torch.randint(0, 255, (SIZE,), dtype=torch.uint8)
        self.url = f"127.0.0.1:{port or free_port()}"
        description = L1MemoryDesc(ptr=self.memory.data_ptr(), size=SIZE, align_bytes=ALIGN)
        self.context = create("host", l1_memory_desc=description, listen_url=self.url, advertise_url=self.url)

    def read(self, other: Server, blocks: list[tuple[int, int]], into: list[tuple[int, int]]) -> Any:
        """Reads from another server and waits for the end."""
        client = self.context.get_transfer_channel_client(other.url)
        local = self.context.get_transfer_channel_address(into)
        remote = other.context.get_transfer_channel_address(blocks)
        return finished(client, client.submit_read(local, remote))


def finished(client: Any, task: int) -> Any:
    """Returns the final status of a read."""
    deadline = time.monotonic() + 20
    while not (status := client.query_read_status(task)).is_finished():
        assert status.succeeded_mask == [] and time.monotonic() < deadline
        time.sleep(0.001)
    return status


@pytest.fixture
def pair() -> Iterator[tuple[Server, Server]]:
    one, two = Server(), Server()
    yield one, two
    one.context.close()
    two.context.close()


def test_reads(pair: tuple[Server, Server]) -> None:
    one, two = pair
    status = one.read(two, [(0, 512), (4096, 256)], [(1024, 512), (0, 256)])
    assert status.succeeded_mask == [True, True]
    assert torch.equal(one.memory[1024:1536], two.memory[:512])
    assert torch.equal(one.memory[:256], two.memory[4096:4352])
    assert two.read(one, [(0, 256)], [(256, 256)]).succeeded_mask == [True]
    assert one.context.get_num_connected_clients() == two.context.get_num_connected_clients() == 1


def test_what_is_refused(pair: tuple[Server, Server]) -> None:
    one, two = pair
    for block in ((SIZE, 256), (SIZE - 128, 256), (-1, 10), (0, 0)):
        with pytest.raises(ValueError, match="outside the registered"):
            one.context.get_transfer_channel_address([block])
    client = one.context.get_transfer_channel_client(two.url)
    local = one.context.get_transfer_channel_address([(0, 256), (256, 128)])
    with pytest.raises(ValueError, match="2 local addresses do not pair with 1"):
        client.submit_read(local, local[:1])
    with pytest.raises(ValueError, match="address 0 has 256 bytes here and 128 there"):
        client.submit_read(local[:1], local[1:])
    with pytest.raises(KeyError, match="unknown read 99"):
        client.query_read_status(99)
    task = client.submit_read(local[:1], local[:1])
    assert finished(client, task).succeeded_mask == [True]
    with pytest.raises(KeyError):
        client.query_read_status(task)


def test_nobody_can_write_into_a_servers_memory(pair: tuple[Server, Server]) -> None:
    import kvlink

    _, two = pair
    with kvlink.open("host") as stranger:
        region = stranger.allocate(256, name="mine")
        peer = stranger.connect(two.url)
        assert peer.regions["lmcache"].access == "r"
        with pytest.raises(kvlink.KvlinkError):
            peer.put(kvlink.ranges(region, peer.regions["lmcache"], [(0, 0, 256)])).wait()


def test_a_peer_that_went_away_fails_reads_and_is_connected_again(pair: tuple[Server, Server]) -> None:
    one, _ = pair
    port = free_port()
    gone = Server(port)
    client = one.context.get_transfer_channel_client(gone.url)
    gone.context.close()
    address = one.context.get_transfer_channel_address([(0, 256)])
    deadline = time.monotonic() + 20
    while client.alive:
        assert time.monotonic() < deadline, "the loss is not noticed"
        time.sleep(0.01)
    assert finished(client, client.submit_read(address, address)).succeeded_mask == [False]
    back = Server(port)
    try:
        assert one.read(back, [(0, 256)], [(512, 256)]).succeeded_mask == [True]
        assert torch.equal(one.memory[512:768], back.memory[:256])
    finally:
        back.context.close()


def test_nobody_listens(pair: tuple[Server, Server]) -> None:
    with pytest.raises(ConnectionError):
        pair[0].context.get_transfer_channel_client(f"127.0.0.1:{free_port()}")


def test_two_threads_that_connect_at_once_get_one_client(pair: tuple[Server, Server]) -> None:
    one, two = pair
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(one.context.get_transfer_channel_client(two.url)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6 and len({id(client) for client in found}) == 1
    one.context.remove_transfer_channel_client(two.url)
    one.context.remove_transfer_channel_client("10.1.2.3:4")
    assert one.context.get_num_connected_clients() == 0
    assert one.context.get_transfer_channel_client(two.url) is not found[0]


def test_the_names_are_in_lmcaches_registry() -> None:
    code = (
        "import lmcache; from lmcache.v1.distributed.transfer_channel.factory import "
        "_TRANSFER_CHANNEL_FACTORY_REGISTRY as r; print(*sorted(r)); "
        "from kvlink_lmcache.mp import names; print(*names())"
    )
    register = "from kvlink_lmcache import registration; registration.register(); "
    done = subprocess.run(
        [sys.executable, "-c", register + code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    registered, ours = (set(line.split()) for line in done.stdout.splitlines()[-2:])
    assert {"kvlink", "host"} <= ours <= registered
