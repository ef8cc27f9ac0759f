"""The driver's decisions, on a Ray that is a list of actors: each test says what they answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codebook_builder.dispatch import Dispatch, code_hash
from codebook_builder.tasks import Failure, ShardResult, ShardTask
from codebook_schemas import ClusterConfig, UserError
from codebook_schemas.inputs import ShardEntry

HANG = "hang"


class RayError(Exception):
    """An actor, or its node, is gone."""


class RayTaskError(RayError):
    """The actor's method raised."""


class Call:
    """One call of an actor: the reference to its result. `task` is None for `ready`."""

    def __init__(self, actor: FakeActor, task: ShardTask | None = None) -> None:
        self.actor, self.task = actor, task
        actor.calls.append(self)


class FakeActor:
    """Works off its calls one at a time."""

    def __init__(self, number: int) -> None:
        self.number, self.killed = number, False
        self.calls: list[Call] = []
        self.ready = SimpleNamespace(remote=lambda: Call(self))
        self.process = SimpleNamespace(remote=lambda task: Call(self, task))


@dataclass
class FakeRay:
    """What of Ray the driver uses.

    process: what an actor's number and a shard's name lead to: None (it is done), an exception, or HANG until the actor is
    killed. starts: whether the actor of a number starts. outruns: shards whose answer arrives although their actor was killed.
    """

    process: Callable[[int, str], Any]
    starts: Callable[[int], bool] = lambda number: True
    outruns: str = ""
    actors: list[FakeActor] = field(default_factory=list)

    @property
    def exceptions(self) -> Any:
        return SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self.start))

    def start(self, _: float) -> FakeActor:
        self.actors.append(FakeActor(len(self.actors)))
        return self.actors[-1]

    def kill(self, actor: FakeActor) -> None:
        actor.killed = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "node", "Alive": True}]

    def answer(self, call: Call) -> Any:
        if call.task is None:
            return ("node", code_hash()) if self.starts(call.actor.number) else RayError("node went away")
        name = call.task.shard.name[6:]
        if call.actor.killed and not (name in self.outruns and call.actor.calls[0] is call):
            return RayError("killed")
        found = self.process(call.actor.number, name)
        if found == HANG and not call.actor.killed:
            return HANG
        return found if isinstance(found, Exception) else ShardResult(call.task.shard.name, rows=1, images=1, skipped=())

    def wait(self, calls: list[Call], num_returns: int, timeout: float | None) -> tuple[list[Call], list[Call]]:
        for call in calls:
            if (call.actor.killed or call.actor.calls[0] is call) and self.answer(call) != HANG:
                return [call], []
        assert timeout is not None, "the driver waits for ever"
        time.sleep(timeout)
        return [], calls

    def get(self, call: Call) -> Any:
        found = self.answer(call)
        call.actor.calls.remove(call)
        if isinstance(found, Exception):
            raise found
        return found


def run(monkeypatch: pytest.MonkeyPatch, ray: FakeRay, names: str, **config: Any) -> dict[str, str | None]:
    """Of every shard (a letter each): why it was given up, or None."""
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    entries = [ShardEntry(name=f"00000-{n}", path="/x", bytes=1, sha256="0" * 64, samples=1) for n in names]
    tasks = [ShardTask(None, entry, Path("/x")) for entry in entries]  # type: ignore[arg-type]  # nothing is probed
    found: dict[str, str | None] = {}
    for outcome in Dispatch(ClusterConfig(**config), tasks).outcomes():
        name = outcome.task.shard.name if isinstance(outcome, Failure) else outcome.shard
        assert name not in found
        found[name[6:]] = outcome.error if isinstance(outcome, Failure) else None
    return found


def test_nodes_may_go_away_any_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other start fails: more failed starts in all than in a row would end the build."""
    lost = {1: "a", 3: "b", 5: "c", 7: "d"}
    ray = FakeRay(
        lambda number, name: RayError("preempted") if lost.get(number) == name else None, starts=lambda number: number % 2 == 1
    )
    assert run(monkeypatch, ray, "abcd", attempts=2, workers=1, in_flight=1) == dict.fromkeys("abcd")
    assert len(ray.actors) == 10


def test_workers_that_never_start_end_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda number, name: None, starts=lambda number: False)
    with pytest.raises(UserError, match="workers die while they start: node went away"):
        run(monkeypatch, ray, "ab", attempts=2, workers=2)
    assert len(ray.actors) == 2 + 3


@pytest.mark.parametrize("answer", [HANG, RayTaskError("it raised")])
def test_an_answer_that_outruns_the_kill_blames_nobody_else(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """`a` is over its time and its actor is killed, but its answer arrives: `b`, which waited behind it, is innocent."""
    slow = FakeRay(lambda number, name: None, outruns="a")
    slow.process = lambda number, name: None if name != "a" else answer if slow.actors[number].killed else HANG
    found = run(monkeypatch, slow, "ab", attempts=1, workers=1, in_flight=2, shard_seconds=0.05)
    assert found["b"] is None
    assert (found["a"] is None) == (answer == HANG)
    assert len(slow.actors) == 2


def test_a_death_is_not_said_to_be_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(lambda number, name: RayError("died"))
    limited = run(monkeypatch, ray, "a", attempts=1, worker_memory_gb=3)["a"]
    assert limited is not None
    assert "it crashed, was killed, or held more than 3 GiB (cluster.worker_memory_gb); which of these is not known" in limited
    unlimited = run(monkeypatch, FakeRay(ray.process), "a", attempts=1)["a"]
    assert unlimited is not None
    assert "worker_memory_gb" not in unlimited
