"""The end of a process: what comes before its threads are waited for, and loader workers that are shut down."""

import subprocess
import sys
import textwrap

import psutil
from torch.utils.data import DataLoader

from hjepa_engine.data import shutdown_workers


def test_a_function_that_is_called_before_exit_comes_before_threads_are_waited_for():
    script = """
        import threading
        from hjepa_engine.utils.process import before_exit

        told = threading.Event()
        threading.Thread(target=lambda: print(told.wait(5))).start()
        before_exit(told.set)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_workers_that_are_shut_down_end_and_the_loader_starts_others():
    loader = DataLoader(range(8), batch_size=4, num_workers=2, persistent_workers=True)
    before = set(psutil.Process().children())
    assert len(list(loader)) == 2
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    shutdown_workers(loader)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert len(list(loader)) == 2
    shutdown_workers(loader)
