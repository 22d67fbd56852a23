"""What makes a small model use its memory: the runs behind docs/training.md.

    python experiments/small_recipe.py runs OUTPUT [--workers 2] [--only PATTERN]    # hours; goes on where it stopped
    python experiments/small_recipe.py report OUTPUT docs/training                   # tables and plots from the results

Every run is of the preset `small` on one thread. Time is counted in local steps: one optimiser step without memory on
4 rows of 512 tokens. What other steps cost is measured first, side by side (`calibration.json`), and a run of "the same
time" gets the number of steps that this allows.

A run with a memory trains on its local context first, at a constant rate; so does its baseline. Until they part they
are the same run, so they are trained once (a trunk) and go on from a copy of its checkpoint. Each is also a run of its
own: the configuration in its folder repeats it with `memorizing-transformers train --config`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.training.presets import run_preset
from memorizing_transformers_pytorch.training.settings import Plain, from_plain, merged

LOCAL_SHARE = 0.7  # of the time, before memory and baseline part
TRAINED_ENTRIES = 2_048  # of the memory in training
SIZES = (0, 512, 2_048, 8_192, 65_536)
HELD_OUT_TOKENS = 32_768  # read of each held-out document
LENGTHS = {"10": 1_000, "30": 3_000, "60": 6_000, "120": 12_000}  # minutes of one core, about: local steps


# What a run is


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run: its configuration, and how it is evaluated. trunk, at: the run that it goes on from, after so many
    steps."""

    name: str
    config: Plain
    trunk: str | None = None
    at: int = 0
    sizes: tuple[int, ...] = (0, 8_192)
    controls: bool = False
    evaluated: bool = True


def changed(**sections: Mapping[str, Any]) -> Plain:
    """The preset `small` with some fields changed, on the CPU."""
    return merged(merged(run_preset("small"), {"device": "cpu", "data": {"group": "folder"}}), sections)


def quiet(steps: int) -> Plain:
    """A run that saves and validates at its end only."""
    return {"steps": steps, "validate_every": 10**9, "checkpoint_every": 200, "log_every": 10}


def branches(length: str, seed: int, cost: Mapping[str, float], **model: Any) -> list[Job]:
    """With a memory, and without one for the same time (and for fewer tokens, as many as with the memory); from the
    trunk of this seed."""
    budget = LENGTHS[length]
    local = round(budget * LOCAL_SHARE)
    left = budget - local
    with_memory = local + round(left / cost["memory"])
    every_size = length in ("30", list(LENGTHS)[-1])

    def job(kind: str, steps: int, from_step: int, **options: Any) -> Job:
        config = changed(
            training=quiet(steps),
            memory={"from_step": from_step, "growth": [[0, TRAINED_ENTRIES]]},
            optimizer={"decay_share": 1 - local / steps},
        )
        trunk = {"trunk": f"trunk-{seed}", "at": local}
        return Job(name=f"{kind}-{length}-seed{seed}", config={**config, "seed": seed}, **trunk, **options)

    jobs = [
        job("memory", with_memory, local, sizes=SIZES if every_size else (0, 8_192), controls=every_size),
        job("same-time", budget, budget),
    ]
    if length == "10":
        jobs.append(job("same-tokens", with_memory, with_memory, sizes=(0,)))
    return jobs


def trunk(seed: int, steps: int) -> Job:
    """Local training at a constant rate."""
    config = changed(
        training=quiet(steps),
        memory={"from_step": 10**9, "growth": [[0, TRAINED_ENTRIES]]},
        optimizer={"decay_share": 0.0},
    )
    return Job(name=f"trunk-{seed}@{steps}", config={**config, "seed": seed}, evaluated=False)


def wide(length: str, seed: int, window: int, cost: Mapping[str, float]) -> Job:
    """No memory, but a longer segment, for the same time."""
    steps = round(LENGTHS[length] / cost[f"window-{window}"])
    training = {**quiet(steps), "segment_length": window, "rows": 2048 // window}
    config = changed(training=training, memory={"from_step": steps}, optimizer={"decay_share": 1 - LOCAL_SHARE})
    return Job(name=f"window{window}-{length}-seed{seed}", config={**config, "seed": seed}, sizes=(0,))


def variant(name: str, cost: float, sizes: tuple[int, ...] = (0, 8_192), share: float = 0.3, **sections: Any) -> Job:
    """A change of the recipe at half the shortest length, the memory in the last `share` of its time."""
    budget = LENGTHS["10"] // 2
    local = round(budget * (1 - share))
    steps = local + round((budget - local) / cost)
    never = name.endswith("never")
    config = changed(
        training=quiet(steps),
        memory={"from_step": steps if never else local, "growth": [[0, TRAINED_ENTRIES]]},
        optimizer={"decay_share": 1 - LOCAL_SHARE if share == 1 else 1 - local / steps},
    )
    same_model = set(sections) <= {"memory"} and local > 0
    start = {"trunk": "trunk-0", "at": local} if same_model else {}
    return Job(name=f"variant-{name}", config=merged(config, sections), sizes=sizes, **start)


def variants(cost: Mapping[str, float]) -> list[Job]:
    memory = cost["memory"]
    return [
        variant("recipe", memory),
        variant("memory-never", 1.0),
        variant("plain", memory, model={"qk_init": "independent", "short_conv": 0}),
        variant("plain-memory-never", 1.0, model={"qk_init": "independent", "short_conv": 0}),
        variant("memory-always", memory, share=1.0),
        variant("trained-with-8192", cost["memory-8192"], memory={"growth": []}),
        variant("layer-3", memory, model={"memorizing_layers": 3}),
        variant("layer-1", memory, model={"memorizing_layers": 1}),
        variant("local-first-40", memory, share=0.6),
        variant("local-first-85", memory, share=0.15),
        variant("segment-128", cost["segment-128"], training={"segment_length": 128, "rows": 16}),
        variant("bytes", memory, model={"num_tokens": 256}, data={"tokenizer": "bytes"}),
        variant("random-start", memory, model={"qk_init": "independent"}),
        variant("wider-convolution", memory, model={"short_conv": 6}),
    ]


def all_jobs(cost: Mapping[str, float], texts: Mapping[str, str]) -> list[Job]:
    """In order of importance."""
    return [
        *branches("10", 0, cost),
        *branches("10", 1, cost),
        *branches("10", 2, cost),
        *branches("30", 0, cost),
        *branches("120", 0, cost),
        *branches("60", 0, cost),
        wide("10", 0, 1_024, cost),
        *other_texts(cost, texts),
        *variants(cost),
        wide("10", 1, 1_024, cost),
        wide("10", 2, 1_024, cost),
    ]


def other_texts(cost: Mapping[str, float], texts: Mapping[str, str]) -> list[Job]:
    """The recipe and its baseline on other corpora: folders by name."""
    jobs = []
    for name, folder in texts.items():
        data = {"source": folder, "test": 0.2}
        jobs.append(variant(f"{name}-recipe", cost["memory"], data=data))
        jobs.append(variant(f"{name}-memory-never", 1.0, data=data))
    return jobs


# Running them


def calibrate(output: Path, repeats: int = 15) -> dict[str, float]:
    """What steps cost in local steps: medians of CPU time, interleaved, on one thread, memories full; kept on disk."""
    path = output / "calibration.json"
    if path.is_file():
        found: dict[str, float] = json.loads(path.read_text())["cost"]
        return found
    torch.set_num_threads(1)
    kinds: dict[str, Callable[[], None]] = {
        "local": step_of(4, 512, 0),
        "memory": step_of(4, 512, TRAINED_ENTRIES),
        "memory-8192": step_of(4, 512, 8_192),
        "window-1024": step_of(2, 1_024, 0),
        "segment-128": step_of(16, 128, TRAINED_ENTRIES),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, step in kinds.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    medians = {name: sorted(times)[repeats // 2] for name, times in seconds.items()}
    cost = {name: median / medians["local"] for name, median in medians.items()}
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cost": cost, "median_seconds": medians, "seconds": seconds}, indent=1))
    return cost


def step_of(rows: int, segment_length: int, entries: int) -> Callable[[], None]:
    """One optimiser step of the small model, with a full memory of so many entries (random ones) or none."""
    config = from_plain(run_preset("small")).model
    model = MemorizingTransformer.from_config(dataclasses.replace(config, max_knn_memories=max(entries, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, config.num_tokens, (rows, segment_length))
    memories = model.create_knn_memories(batch_size=rows) if entries else None
    for memory in memories or []:
        memory.add(torch.nn.functional.normalize(torch.randn(rows, entries, 2, config.dim_head), dim=-1))

    def step() -> None:
        loss, _ = model(tokens, memories, labels=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def run_job(job: Job, output: Path) -> None:
    """Train and evaluate, in a process of its own on one thread; what is there already is not done again."""
    folder = output / job.name
    if job.trunk is not None and not folder.exists():
        copy_trunk(output / str(trunk_before(job)), folder, job.config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JOB": json.dumps(dataclasses.asdict(job))}
    command = [sys.executable, __file__, "one", str(output)]
    with (output / f"{job.name}.log").open("a") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def copy_trunk(trunk: Path, folder: Path, config: Plain) -> None:
    """A run of this configuration that stands where the trunk has ended."""
    from memorizing_transformers_pytorch.training.run import CONFIG, METRICS, TOKENIZER
    from memorizing_transformers_pytorch.training.settings import write_yaml

    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shutil.copytree(trunk / "checkpoints", aside / "checkpoints")
    shutil.copy(trunk / TOKENIZER, aside / TOKENIZER)
    shutil.copy(trunk / METRICS, aside / METRICS)
    write_yaml(from_plain(config), aside / CONFIG)
    aside.rename(folder)


def one(output: Path) -> None:
    """The work of one process: the job in the environment."""
    import faiss

    from memorizing_transformers_pytorch.cli.evaluate import evaluate_run
    from memorizing_transformers_pytorch.cli.options.evaluate import Evaluate
    from memorizing_transformers_pytorch.training.loop import train

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    job = Job(**json.loads(os.environ["JOB"]))
    folder = output / job.name
    began = time.process_time()
    train(from_plain(job.config), folder, resume=folder.exists())
    trained = time.process_time() - began
    if job.evaluated:
        memory = ",".join(map(str, job.sizes))
        evaluate_run(Evaluate(run=folder, memory=memory, controls=job.controls, max_tokens=HELD_OUT_TOKENS))
    (folder / "done.json").write_text(json.dumps({"cpu_seconds_of_the_last_process": trained}))


def run_all(output: Path, workers: int, only: str, texts: Mapping[str, str]) -> None:
    """All jobs, in order, as soon as what they go on from is there."""
    cost = calibrate(output)
    print("cost of a step, in local steps:", {name: round(value, 2) for name, value in cost.items()}, flush=True)
    jobs = [job for job in all_jobs(cost, texts) if fnmatch.fnmatch(job.name, only)]
    queue = with_trunks(jobs)
    lock, running = threading.Condition(), set[str]()

    def done(name: str) -> bool:
        return (output / name / "done.json").is_file()

    def ready(job: Job) -> bool:
        before = trunk_before(job)
        return job.name not in running and (before is None or done(before))

    def work() -> None:
        while True:
            with lock:
                left = [job for job in queue if not done(job.name)]
                while left and not any(ready(job) for job in left):
                    if all(job.name not in running for job in left):
                        return
                    lock.wait(timeout=5)
                    left = [job for job in queue if not done(job.name)]
                if not left:
                    return
                job = next(job for job in left if ready(job))
                running.add(job.name)
            print(time.strftime("%H:%M:%S"), job.name, flush=True)
            failed = False
            try:
                run_job(job, output)
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"{job.name} failed: {error}; see its log", flush=True)
            with lock:
                if not failed:
                    running.discard(job.name)
                lock.notify_all()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def with_trunks(jobs: list[Job]) -> list[Job]:
    """The jobs, each after the pieces of the trunk that it goes on from; a piece goes on from the piece before."""
    ends = sorted({(job.trunk, job.at) for job in jobs if job.trunk is not None}, key=lambda end: (end[0], end[1]))
    pieces: dict[str, Job] = {}
    for name, at in ends:
        before = [end for other, end in ends if other == name and end < at]
        piece = trunk(int(str(name).removeprefix("trunk-")), at)
        pieces[piece.name] = dataclasses.replace(piece, trunk=name if before else None, at=max(before, default=0))
    queue: list[Job] = []
    for job in jobs:
        needed = [f"{name}@{at}" for name, at in ends if name == job.trunk and at <= job.at]
        queue += [pieces[name] for name in needed if pieces[name] not in queue]
        queue.append(job)
    long = [piece for piece in queue if piece.name in pieces and piece.name.startswith("trunk-0")]
    return long + [job for job in queue if job not in long]


def trunk_before(job: Job) -> str | None:
    return None if job.trunk is None else f"{job.trunk}@{job.at}"


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Train and evaluate everything that is not there yet."""

    output: tyro.conf.Positional[Path]
    workers: int = 2
    only: str = "*"
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other corpora to try: names and folders."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables and plots from the results."""

    output: tyro.conf.Positional[Path]
    to: tyro.conf.Positional[Path]


Command = Annotated[Runs, tyro.conf.subcommand("runs")] | Annotated[Report, tyro.conf.subcommand("report")]

if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(Path(sys.argv[2]))
    else:
        options = tyro.cli(Command)
        if isinstance(options, Runs):
            run_all(options.output, options.workers, options.only, options.texts)
        else:
            import small_recipe_report

            small_recipe_report.write(options.output, options.to)
