"""When rows that wait for a place are let in: at once, or together with others, since those that run wait for a prompt."""

NEWEST = 0.1  # what the newest round counts of the mean


class Company:
    """Weighs places that nobody has against the pause that each prompt is for rows that run.

    The pause is much the same for one prompt as for several, and while more rows wait than have places, further places will
    come free. What idle places cost grows with the square of the time; prompts are cheapest in all where that cost has come
    to that of one pause.
    """

    def __init__(self) -> None:
        self._pause: float | None = None  # seconds of the shortest: what a prompt costs however short it is
        self._round: float | None = None  # seconds of one, on average
        self._num_idle = 0  # places that were idle, added up over rounds since rows were let in

    def note_pause(self, seconds: float) -> None:
        """Rows were let in."""
        self._pause = seconds if self._pause is None else min(self._pause, seconds)
        self._num_idle = 0

    def note_round(self, seconds: float) -> None:
        """A round took so long."""
        self._round = seconds if self._round is None else (1 - NEWEST) * self._round + NEWEST * seconds

    def is_awaited(self, *, num_running: int, num_idle: int, num_waiting: int) -> bool:
        """Whether rows that wait had better wait for further places; asked before each round."""
        if num_waiting <= num_idle or not num_running or self._pause is None or self._round is None:
            return False
        self._num_idle += num_idle
        return self._num_idle * self._round < self._pause * num_running
