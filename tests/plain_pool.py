"""A pool without Ray: one bench in this process, one item after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tuner.scoring import Bench

Result = TypeVar("Result")


@dataclass(frozen=True)
class Later(Generic[Result]):
    """Work that is done when its result is asked for."""

    work: Callable[[], Result]

    def ready(self) -> bool:
        return True

    def result(self) -> Result:
        return self.work()


@dataclass(frozen=True)
class PlainWorkers:
    """Made of a bench, so it is a pool as well."""

    bench: Bench

    def map(
        self,
        work: Callable[..., Result],
        items: Sequence[tuple[Any, ...]],
        show: Callable[[int], None] = lambda done: None,
    ) -> list[Result]:
        results: list[Result] = []
        for item in items:
            results.append(work(self.bench, *item))
            show(len(results))
        return results

    def begin(self, work: Callable[..., Result], item: tuple[Any, ...]) -> Later[Result]:
        return Later(lambda: work(self.bench, *item))
