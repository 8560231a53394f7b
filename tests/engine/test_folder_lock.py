from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pcka.engine.folder_lock import FolderInUseError, lock_folder

# Locks a folder, forks a process that outlives it, and waits to be killed.
PARENT = """
import os, sys, time
from pcka.engine.folder_lock import lock_folder

lock_folder(sys.argv[1])
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""

# Another file gets the number of the handle before the fork; the child has to be able to read it.
REUSED = """
import os, sys
from pcka.engine.folder_lock import lock_folder

handle = lock_folder(sys.argv[1])
os.close(handle)
other = os.open(os.devnull, os.O_RDONLY)
assert other == handle
child = os.fork()
if child == 0:
    os.read(other, 1)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


def test_a_forked_process_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    words = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        try:
            with pytest.raises(FolderInUseError, match="another process is using"):
                lock_folder(tmp_path)
            parent.kill()
            parent.wait()
            os.kill(child, 0)  # still there
            os.close(lock_folder(tmp_path))
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_handle_that_was_closed_and_given_away_is_left_to_the_child(tmp_path):
    words = [sys.executable, "-c", REUSED, str(tmp_path)]
    assert subprocess.run(words, capture_output=True).returncode == 0
