"""Ranks that are threads of one process: a communicator whose messages are references."""

import threading

import numpy as np

TIME_LIMIT = 30  # seconds in which all ranks must come to an exchange


class _Meeting:
    """Where the ranks of a group leave things for each other."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIME_LIMIT)
        self.left = [None] * size

    def exchange(self, rank, value):
        self.left[rank] = value
        self.barrier.wait()
        values = list(self.left)
        self.barrier.wait()
        return values


class ThreadCommunicator:
    """One rank."""

    def __init__(self, meeting, rank):
        self._meeting, self.rank, self.size = meeting, rank, meeting.size

    def start_sum(self, buffer):
        values = self._meeting.exchange(self.rank, buffer)
        total = sum(values[1:], start=values[0])
        return lambda: total

    def start_gather(self, buffer, counts):
        values = self._meeting.exchange(self.rank, buffer)
        assert [v.shape[0] for v in values] == list(counts)
        import array_api_compat

        whole = array_api_compat.array_namespace(buffer).concat(values)
        return lambda: whole

    def broadcast(self, buffer, root=0):
        return self._meeting.exchange(self.rank, buffer)[root]

    def gather_numbers(self, row):
        return np.stack(self._meeting.exchange(self.rank, np.array(row, dtype=float)))

    def gather_objects(self, value):
        return self._meeting.exchange(self.rank, value)

    def split(self, groups):
        meetings = [_Meeting(len(group)) for group in groups] if self.rank == 0 else None
        meetings = self.gather_objects(meetings)[0]
        number = next(i for i, group in enumerate(groups) if self.rank in group)
        return ThreadCommunicator(meetings[number], list(groups[number]).index(self.rank))

    def describe(self):
        return f"{self.size} threads"


def on_ranks(size, function):
    """``[function(communicator)]`` of every rank; exceptions in place of results."""
    meeting, results = _Meeting(size), [None] * size

    def work(rank):
        try:
            results[rank] = function(ThreadCommunicator(meeting, rank))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=4 * TIME_LIMIT)
    assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
    return results
