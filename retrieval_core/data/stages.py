"""Stages of a data set's build: a function mapped over chunks, each result a Parquet file.

A result's name is a digest of what it was made from and it is written atomically: a build that was
killed goes on after the chunks that are done, and gives the same files. Daft maps the function, on
this machine's cores or on a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RetrievalError, explain, import_library
from ..files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

# From a chunk, plain JSON, to a table of the rows kept and the number of rejected ones by reason.
Function = Callable[[Any], "tuple[pa.Table, dict[str, int]]"]
# Called with chunks done, chunks in all, rows kept, rows rejected.
Progress = Callable[[int, int, int, int], None]

# Daft reports its use over the network from its import on, and so do the workers that inherit this.
SILENT = {"DAFT_ANALYTICS_ENABLED": "0"}
os.environ.update(SILENT)

PACK = Path(__file__).parents[2]
REJECTED = b"rejected"  # key in a result's schema metadata
# Daft's worker processes speak through Unix sockets. And under a host that loads the pack by its
# path, as ComfyUI does, another process could not import its modules. Threads do without both.
IN_PROCESSES = os.name != "nt" and __name__.startswith("retrieval_core.")
# Chunks that are done in threads by the time that processes have started.
FEW = 4
# Runs of a stage on a cluster until what it still lacks is an error.
ATTEMPTS = 3


def run_stage(
    name: str,
    function: Function,
    chunks: Sequence[Any],
    folder: Path,
    *,
    settings: Any = None,
    ray: str | None = None,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Runs `function` on every chunk whose result is not in `folder` yet.

    Args:
        name: of the stage, with a version that changes whenever its results do.
        function: of a module, or a partial of one; it runs in other processes.
        chunks, settings: plain JSON; with the name they identify a result.
        ray: address of a Ray cluster whose machines see the pack, `folder` and the sources under
            the same paths; None is this machine.

    Returns:
        The results' files in the order of the chunks, for `read_results`.

    Raises:
        RetrievalError: `function` raised it, a result cannot be written, or the engine failed.
        Whatever `on_progress` raises, to interrupt.
    """
    paths = [folder / name / f"{digest_json([name, settings, chunk])}.parquet" for chunk in chunks]
    done = kept = rejected = 0

    def report(more_kept: int, more_rejected: int) -> None:
        nonlocal done, kept, rejected
        done, kept, rejected = done + 1, kept + more_kept, rejected + more_rejected
        if on_progress is not None:
            on_progress(done, len(chunks), kept, rejected)

    def collect(tasks: dict[str, str]) -> dict[str, str]:
        """Reports the tasks (path -> task) that have a result, and returns the others."""
        finished = {path for path in tasks if Path(path).is_file()}
        for path in finished:
            report(*_count_rows(path))
        return {path: task for path, task in tasks.items() if path not in finished}

    pending = collect(
        {str(path): json.dumps([str(path), chunk]) for path, chunk in zip(paths, chunks)}
    )
    # A machine that is lost takes results with it that Ray had not handed over, which ends the run
    # although they are in files.
    for left in reversed(range(1 if ray is None else ATTEMPTS)):
        try:
            for path, *counts in _map_tasks(function, list(pending.values()), ray):
                del pending[path]
                report(*counts)
            break
        except _EngineError as error:
            pending = collect(pending)
            if not left:
                raise RetrievalError(
                    f"The stage '{name}' broke off after {done} of {len(chunks)} chunks ({error}); "
                    "mend that, and the same command goes on from there."
                ) from error
    return paths


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _run_task(function: Function, task: str) -> str:
    """Writes the result of one chunk; JSON of its path and the numbers of rows kept and rejected.

    task: JSON of the result's path and the chunk.
    """
    import pyarrow.parquet as pq

    path, chunk = json.loads(task)
    table, rejected = function(chunk)
    metadata = {REJECTED: json.dumps(rejected, sort_keys=True)}
    table = table.replace_schema_metadata(metadata)
    atomic_write(path, lambda temporary: pq.write_table(table, temporary), sync=False)
    return json.dumps([path, table.num_rows, sum(rejected.values())])


class _EngineError(Exception):
    """What ended a run of the engine, but for a RetrievalError of the stage's function."""


def _map_tasks(function: Function, tasks: list[str], ray: str | None) -> Iterator[Any]:
    """The results of `_run_task`, as they come.

    Raises:
        RetrievalError: of the function. _EngineError: anything else.
    """
    if not tasks:
        return
    daft = import_library("daft", "data")
    _choose_runner(daft, ray)

    def attempt(task: str) -> str:
        try:
            return _run_task(function, task)
        except RetrievalError as error:  # the engine would wrap it in errors of its own
            return json.dumps({"error": str(error)})

    in_processes = IN_PROCESSES and ray is None and len(tasks) > FEW
    mapped = daft.func(return_dtype=daft.DataType.string(), use_process=in_processes)(attempt)
    frame = daft.from_pydict({"task": tasks})
    # One task at a time: on this machine in batches, on a cluster in partitions.
    frame = frame.into_batches(1) if ray is None else frame.into_partitions(len(tasks))
    try:
        for row in frame.select(mapped(daft.col("task")).alias("result")).iter_rows():
            result = json.loads(row["result"])
            if isinstance(result, dict):
                raise RetrievalError(result["error"])
            yield result
    except RetrievalError:
        raise
    except Exception as error:  # Daft and Ray raise what they like
        raise _EngineError(_find_cause(error)) from error


def _choose_runner(daft: Any, address: str | None) -> None:
    """Makes Daft run on this machine, its default, or on a Ray cluster."""
    if address is not None:
        ray = import_library("ray", "data")
        if not ray.is_initialized():
            environment = {"env_vars": {"PYTHONPATH": str(PACK), **SILENT}}
            try:
                ray.init(
                    address, runtime_env=environment, log_to_driver=False, logging_level="ERROR"
                )
            except Exception as error:  # of its own, of gRPC, of the network
                raise RetrievalError(
                    f"There is no Ray cluster at '{address}' ({explain(error)}); give the address "
                    "that 'ray start --head' prints, or leave it out to build on this machine."
                ) from error
        daft.set_runner_ray(noop_if_initialized=True)
    runner, wanted = daft.get_or_infer_runner_type(), "native" if address is None else "ray"
    if runner != wanted:
        raise RetrievalError(
            f"Daft's runner in this process is {runner} and cannot become {wanted}; build in "
            "another process, without DAFT_RUNNER set."
        )


def _find_cause(error: Exception) -> str:
    """The last line of an error that is not empty: the engine puts whole tracebacks into one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".")[:300] if lines else type(error).__name__


def _count_rows(path: str) -> tuple[int, int]:
    """Rows kept and rejected of a result."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    return metadata.num_rows, sum(json.loads(metadata.metadata[REJECTED]).values())


def set_columns(rows: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """The rows with further columns, which replace those of their names."""
    for name, column in columns.items():
        if name in rows.column_names:
            rows = rows.set_column(rows.column_names.index(name), name, column)
        else:
            rows = rows.append_column(name, column)
    return rows


def read_results(paths: Sequence[Path]) -> tuple[pa.Table, dict[str, int]]:
    """The rows of a stage's results, in order, and the number of rejected ones by reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in paths]
    rejected: Counter[str] = Counter()
    for table in tables:
        rejected.update(json.loads(table.schema.metadata[REJECTED]))
    whole = pa.concat_tables(table.replace_schema_metadata() for table in tables)
    return whole, dict(sorted(rejected.items()))
