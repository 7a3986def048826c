"""A process with one channel that does what it is told, one JSON line at a time; started by the tests beside it."""

import ctypes
import json
import os
import signal
import sys
import threading
import time

import numpy as np

import kvlink

_libc = ctypes.PyDLL(None)  # PyDLL: the GIL stays held during the call


def hold_gil(seconds):
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        _libc.usleep(int(min(left, 0.9) * 1e6))


class Agent:
    def __init__(self):
        self.channel = self.region = self.memory = None
        self.transfers = []
        self.lost = []
        self.notified = 0
        self.filling = threading.Event()

    def open(self, *, options, nbytes, allocate=False, **arguments):
        self.channel = kvlink.open("host", options=options, **arguments)
        if allocate:
            self.region = self.channel.allocate(nbytes, name="agent")
            self.memory = np.frombuffer(self.region.buffer(), np.uint8)
        else:
            self.memory = np.zeros(nbytes, np.uint8)
            self.region = self.channel.register(self.memory, name="agent")
        self.memory[:] = 1
        self.channel.on_request = lambda peer, message: message
        self.channel.on_notify = self._on_notify
        self.channel.on_peer_lost = lambda peer, error: self.lost.append((time.monotonic(), str(error)))
        return self.channel.address

    def _on_notify(self, peer, message):
        self.notified += 1
        if message.startswith(b"gil "):
            hold_gil(float(message[4:]))

    def connect(self, address):
        return self.channel.connect(address, timeout=20).id

    def _peer(self):
        return next(iter(self.channel.peers().values()))

    def start(self, op, region, count, block, blocks):
        """Starts ``count`` transfers of ``blocks`` blocks each with the only peer."""
        peer = self._peer()
        remote = peer.wait_region(region, timeout=10)
        ranges = kvlink.ranges(self.region, remote, [(i * block, i * block, block) for i in range(blocks)])
        # Reversed and interleaved, so that nothing joins and the work takes its time.
        ranges = np.ascontiguousarray(ranges[::-1])
        self.transfers = [getattr(peer, op)(ranges) for _ in range(count)]
        return len(self.transfers)

    def fill(self, region):
        """Puts to the only peer again and again, in the background, until told otherwise or failing."""
        peer = self._peer()
        remote = peer.wait_region(region, timeout=10)
        ranges = kvlink.ranges(self.region, remote, [(0, 0, min(self.region.nbytes, remote.nbytes))])

        def work():
            try:
                while not self.filling.is_set():
                    peer.put(ranges).wait()
            except kvlink.KvlinkError:
                pass

        threading.Thread(target=work, daemon=True).start()

    def outcomes(self, limit):
        """Waits for all started transfers; returns how each ended and how long the last took from now."""
        begin = time.monotonic()
        seen = []
        for transfer in self.transfers:
            try:
                seen.append("ok" if transfer.wait(limit) else "running")
            except kvlink.KvlinkError as error:
                seen.append(type(error).__name__)
        return {"seconds": time.monotonic() - begin, "outcomes": seen}

    def start_and_hold_gil(self, seconds, **arguments):
        """Starts transfers, holds the GIL meanwhile, and says how long the engine took for them."""
        count = self.start(**arguments)
        hold_gil(seconds)
        finished = sum(transfer.done() for transfer in self.transfers)
        durations = [transfer.result().duration_s for transfer in self.transfers if transfer.done()]
        return {"started": count, "finished": finished, "slowest": max(durations, default=None)}

    def fork(self):
        """Leaves a child behind that does nothing; returns its id."""
        child = os.fork()
        if child == 0:
            os.closerange(0, 3)  # not the test's pipes
            while True:
                signal.pause()
        return child

    def wait_lost(self, limit):
        """Waits until a peer was lost; returns how long that took from now, and why."""
        begin = time.monotonic()
        while not self.lost and time.monotonic() < begin + limit:
            time.sleep(0.01)
        return {"seconds": self.lost[0][0] - begin, "why": self.lost[0][1]} if self.lost else None

    def state(self):
        return {"peers": len(self.channel.peers()), "notified": self.notified, "lost": [why for _, why in self.lost]}

    def close(self):
        begin = time.monotonic()
        self.channel.close()
        return time.monotonic() - begin


def main():
    agent = Agent()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = {"ok": getattr(agent, name)(**command)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
