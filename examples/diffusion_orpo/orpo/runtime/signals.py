"""Preemption: on SIGTERM or SIGINT a run finishes its step, saves a checkpoint and exits with a status of its own.

SLURM, spot instances and Kubernetes send SIGTERM some time before SIGKILL, a keyboard sends SIGINT.
"""

import logging
import os
import signal
import threading
import time


logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h, "try again later". Unlike 143 and 130, which shells also report for a process that a signal
# ended half-way, it tells a job script that the checkpoint was written.
EXIT_STATUS = 75
# A launcher passes the signal on, even to a process that got it from SLURM already: a copy this close is not a second signal.
COPY_SECONDS = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, the first signal is remembered and the second ends the process at once.

    Python lets only the main thread handle signals: in any other, as in gradio and notebooks, they are not received.

    Attributes:
        received: the first signal, or None.
    """

    def __enter__(self) -> "StopSignals":
        self.received: signal.Signals | None = None
        self._previous: dict = {}
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "The run is not in the process's main thread, so it can't receive SIGTERM and SIGINT: they will end it without a"
                " checkpoint"
            )
            return self
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self.received is None:
            self.received, self._first = signal.Signals(number), time.monotonic()
            # os.write, since logging and print must not be called from a handler that may have interrupted them.
            os.write(
                2, f"\n{self.received.name}: ending after this step, with a checkpoint; again: at once\n".encode()
            )
        elif time.monotonic() - self._first > COPY_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def shield_worker(worker_id: int) -> None:
    """For `DataLoader(worker_init_fn=)`: a signal to all processes of the run does not end its workers.

    The last step needs them. They still end when their own process terminates them, or dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_parents_word, daemon=True).start()


def _end_on_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
