"""The pool of actors, which may grow, shrink and lose members."""

from __future__ import annotations

import os
from typing import Any

import ray

from sparse_expansion.execution.ray.actor import FILES, SIGNS, ActorHandle, UnitActor
from sparse_expansion.work.spec import WorkerSpec


class WorkerPool:
    """Actors that were asked for, by name."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        num_workers: int,
        num_gpus: float,
        num_cpus: float,
        accelerator_type: str | None,
        environment: dict[str, str],
    ) -> None:
        """Nobody is asked for yet.

        Args:
            spec: what every worker is set up with.
            num_workers: actors at most.
            num_gpus: GPUs, or a share of one, of each.
            num_cpus: CPUs of each.
            accelerator_type: Ray's name of the accelerator that their machines have; None for any.
            environment: variables that each gets beside those of its machine.
        """
        self.spec = spec
        self.num_workers = num_workers
        self.handles: dict[str, ActorHandle] = {}
        self.num_lost = 0
        self.options: dict[str, Any] = {"num_gpus": num_gpus, "num_cpus": num_cpus}
        if accelerator_type is not None:
            self.options["accelerator_type"] = accelerator_type
        # An environment of its own, even an empty one, takes a worker that Ray starts for it.
        if environment:
            self.options["runtime_env"] = {"env_vars": environment}
        self._actor_class = ray.remote(concurrency_groups={SIGNS: 1, FILES: 1})(UnitActor)
        self._num_made = 0

    def ask_for(self, wanted: int) -> None:
        """Ask Ray for actors until there are so many, or as many as the pool may have."""
        while len(self.handles) < min(wanted, self.num_workers):
            name = f"worker-{self._num_made:03d}"
            self._num_made += 1
            actor = self._actor_class.options(
                name=f"sparse-expansion-{os.getpid()}-{name}",
                max_restarts=0,
                max_task_retries=0,
                **self.options,
            ).remote(self.spec)
            self.handles[name] = ActorHandle(name, actor, actor.ready.remote())

    def drop(self, handle: ActorHandle) -> None:
        """End an actor."""
        self.handles.pop(handle.name, None)
        # After ActorUnavailableError the old call may still be running.
        ray.kill(handle.actor, no_restart=True)

    def close(self) -> None:
        """End all actors."""
        for handle in list(self.handles.values()):
            self.drop(handle)

    @property
    def has_live_worker(self) -> bool:
        """Whether an actor has come up."""
        return any(handle.is_up for handle in self.handles.values())

    @property
    def room(self) -> str:
        """What one actor needs, for people."""
        kind = self.options.get("accelerator_type")
        gpu = "GPU" if kind is None else f"GPU of type {kind}"
        return f"{self.options['num_gpus']:g} {gpu} and {self.options['num_cpus']:g} CPU"
