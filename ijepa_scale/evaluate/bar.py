"""Progress bars of evaluations. Knows nothing of what progresses."""

from __future__ import annotations

from tqdm import tqdm


class Bar:
    """A bar on a terminal, and nothing elsewhere."""

    def __init__(self, name: str, unit: str, *, shown: bool = True) -> None:
        self._name, self._unit, self._shown = name, unit, shown
        self._bar: tqdm | None = None

    def show(self, done: int, total: int) -> None:
        """Shows that `done` of `total` are done. Ends the bar with the last one, and can begin again."""
        if not self._shown or not total:
            return
        if self._bar is None:
            options = {"unit": self._unit, "desc": self._name, "disable": None, "dynamic_ncols": True}
            self._bar = tqdm(total=total, **options)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None
