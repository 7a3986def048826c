"""What happens to open channels when the interpreter ends."""

import subprocess
import sys

PROGRAM = """
import atexit
import kvlink

channel = None
# A library that is imported after kvlink and takes its device away at exit, as torch_npu does.
atexit.register(lambda: print("device gone, channel closed:", channel.closed))
channel = kvlink.open("host")
other = kvlink.open("host")
peer = other.connect(channel.address)
"""


def test_channels_close_before_what_was_registered_earlier():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "device gone, channel closed: True\n"
