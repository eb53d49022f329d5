"""What a long run says while it goes on: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Seconds between two lines without a terminal; also how far back a speed looks.
INTERVAL = 60.0

# Seconds between two changes of a terminal's bar.
REFRESH = 1.0


def duration(seconds: float) -> str:
    """``seconds`` in two figures, such as 42 s, 12 min, 3.2 h, 23 h or 4 d."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 9.95 else f"{hours:.0f} h" if hours < 99.5 else f"{hours / 24:.0f} d"


class Pace:
    """How fast something is done: over the last ``INTERVAL``, or since the last mark but one where that is longer.

    What comes first can be slower, or much cheaper, than all that follows.
    """

    def __init__(self, seconds: float, done: int) -> None:
        self._marks = deque([(seconds, done)])

    def mark(self, seconds: float, done: int) -> None:
        """``done`` are done, by a clock that stands at ``seconds``."""
        if done > self._marks[-1][1]:
            self._marks.append((seconds, done))
            while len(self._marks) > 2 and self._marks[1][0] <= seconds - INTERVAL:
                self._marks.popleft()

    def seconds_for(self, more: int) -> float | None:
        """Seconds that ``more`` take; None before anything was done."""
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        return (last - first) / (done - before) * more if done > before else None

    def left(self, more: int) -> str:
        """The time that ``more`` take, to stand behind something; nothing before anything was done."""
        seconds = self.seconds_for(more)
        return "" if seconds is None else f", {duration(seconds)} left"


class Progress:
    """What a run shows of its progress, as a context manager: on a terminal a bar with a text, elsewhere lines.

    Args:
        total, done: how many steps there are, and how many were done before.
        silent: show nothing, as in all processes but the first.
    """

    def __init__(self, total: int, done: int, *, silent: bool) -> None:
        self.terminal = not silent and sys.stderr.isatty()
        self._silent = silent
        self._interval = REFRESH if self.terminal else INTERVAL
        self._bar = tqdm(
            total=total,
            initial=done,
            bar_format="|{bar}|",
            dynamic_ncols=True,
            leave=False,
            disable=not self.terminal,
        )
        self._shown = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def reach(self, done: int) -> None:
        """So many are done."""
        self._bar.n = done

    def due(self) -> bool:
        """Whether it is time to show something again."""
        return not self._silent and time.perf_counter() - self._shown >= self._interval

    def show(self, where: str, what: str) -> None:
        """Write ``where`` before and ``what`` behind the bar, or both in a line."""
        if self.terminal:
            self._bar.bar_format = f"{where} |{{bar}}| {what}"
            self._bar.refresh()
            self._shown = time.perf_counter()
        else:
            self.line(f"{where}: {what}")

    def line(self, text: str) -> None:
        """Write a line, above the bar on a terminal."""
        if not self._silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            self._shown = time.perf_counter()

    @contextmanager
    def showing(self, now: Callable[[], tuple[str, str]]) -> Iterator[None]:
        """Show what ``now`` says whenever it is due, from another thread: for work that has no moment to ask."""
        if self._silent:
            yield
            return
        ended = threading.Event()

        def show() -> None:
            while not ended.wait(self._interval):
                self.show(*now())

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def counting(what: str, samples: int, *, silent: bool) -> Iterator[Callable[[int], None]]:
    """Show how many samples are done, and the time left, while something is done to them: call with how many more."""
    done, pace = 0, Pace(time.perf_counter(), 0)

    def now() -> tuple[str, str]:
        return f"{done}/{samples} samples", what + pace.left(samples - done)

    with Progress(samples, 0, silent=silent) as progress, progress.showing(now):

        def count_up(more: int) -> None:
            nonlocal done
            done += more
            pace.mark(time.perf_counter(), done)
            progress.reach(done)

        yield count_up
