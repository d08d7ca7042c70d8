"""What the kept results of `methods` say: figures for programs, tables in Markdown, plots. What is missing is left out.

Called by `methods` after its stages. `readme_table` is the table that the README shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Final

from benchmarks.methods_plan import (
    BEHIND_PREFIX,
    METHODS,
    NAMES,
    Grid,
    Job,
    Method,
    Run,
    distinct,
)
from benchmarks.methods_training import Workplace, read
from benchmarks.report import markdown_table
from reports.plot_style import LIGHT, Theme, legend, png, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rates = Mapping[Method, float]
SERVING_FILE: Final = "serving.json"
_MIB: Final = 2**20


def tuning(grid: Grid, place: Workplace) -> dict[str, dict[str, dict[str, Any]]]:
    """By method, learning rate and task: exact match and loss on the held-out items."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for job in grid.tune():
        path = place.training_file(job.run)
        if path.exists():
            result = read(path)
            of_rate = found.setdefault(job.run.method, {}).setdefault(
                f"{job.run.learning_rate:g}", {}
            )
            of_rate[job.run.task] = {
                "exact_match": result["held_out"]["exact_match"],
                "held_out_loss": result["held_out_loss"],
                "diverged": result["diverged"],
            }
    return found


def chosen_rates(grid: Grid, place: Workplace) -> dict[Method, float] | None:
    """For each method the rate with the most exact matches on the held-out items of all tuning tasks.

    Of equals the one with the lowest loss, which is summed over the tasks. None while any rate is not tried yet.
    """
    found = tuning(grid, place)
    tried = [tasks for of_method in found.values() for tasks in of_method.values()]
    if sum(map(len, tried)) < len(grid.tune()):
        return None

    def merit(method: Method, rate: float) -> tuple[float, float]:
        results = found[method][f"{rate:g}"].values()
        exact = sum(result["exact_match"] for result in results)
        return exact, -sum(result["held_out_loss"] for result in results)

    return {
        method: max(grid.rates[method], key=partial(merit, method))  # the first of equals
        for method in METHODS
    }


def figures(grid: Grid, place: Workplace) -> dict[str, Any]:
    """Everything that is known so far, ready for JSON: percentages, seconds, bytes; a list has a value for each seed."""
    rates = chosen_rates(grid, place)
    serving = place.folder / SERVING_FILE
    found: dict[str, Any] = {"tuning": tuning(grid, place), "rates": rates}
    if rates is not None:
        found["methods"] = _methods(grid, place, grid.compare(rates))
        found["low_data"] = _study(
            place, grid.low_data(rates), lambda run: (run.method, run.num_training)
        )
        found["lengths"] = _study(
            place, grid.length(rates), lambda run: (run.task, run.num_virtual_tokens)
        )
    if serving.exists():
        found["serving"] = read(serving)
    return found


def _results(place: Workplace, jobs: Iterable[Job]) -> list[tuple[Run, dict[str, Any], float]]:
    """(run, training, exact match on test items) of the jobs that are done."""
    return [
        (
            job.run,
            read(place.training_file(job.run)),
            read(place.test_file(job.run))["exact_match"],
        )
        for job in distinct(jobs)
        if place.is_done(job)
    ]


def _methods(grid: Grid, place: Workplace, jobs: Sequence[Job]) -> dict[str, Any]:
    """Cost of training on the cost task, sizes, and quality on each task."""
    found: dict[str, Any] = {}
    for run, training, exact_match in _results(place, jobs):
        entry = found.setdefault(
            run.method,
            {
                "learning_rate": run.learning_rate,
                "num_trained": training["num_trained"],
                "num_stored": training["num_stored"],
                "stored_bytes": training["stored_bytes"],
                "exact_match": {},
                "held_out_loss": {},
                "num_diverged": 0,
                "seconds": [],
                "median_step_seconds": [],
                "peak_bytes": [],
            },
        )
        entry["exact_match"].setdefault(run.task, []).append(exact_match)
        entry["held_out_loss"].setdefault(run.task, []).append(training["held_out_loss"])
        entry["num_diverged"] += training["diverged"]
        if run.task == grid.cost_task:
            for name in ("seconds", "median_step_seconds", "peak_bytes"):
                entry[name].append(training[name])
    return found


def _study(place: Workplace, jobs: Sequence[Job], key: Any) -> dict[str, dict[str, list[float]]]:
    """Exact matches by line and by place on it, which `key` gives."""
    found: dict[str, dict[str, list[float]]] = {}
    for run, _, exact_match in _results(place, jobs):
        line, point = key(run)
        found.setdefault(line, {}).setdefault(str(point), []).append(exact_match)
    return found


# ---- tables ----------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    if not values:
        return ""
    told = f"{mean(values):.{digits}f}"
    return told if len(values) == 1 else f"{told} ± {stdev(values):.{digits}f}"


def readme_table(found: Mapping[str, Any], grid: Grid) -> str:
    """All methods in one table: sizes, exact match on each task, training, serving."""
    counts = [str(count) for count in grid.serving_tasks]
    most = counts[-1]
    head = [
        "method",
        "trained",
        "stored",
        "kB",
        *(f"{task}, %" for task in grid.tasks),
        f"{grid.steps[grid.cost_task]} steps, s",
        "peak, MiB",
        *(f"{count} task{'s' * (count != '1')}, tokens/s" for count in counts),
        f"{most} tasks, MB",
    ]
    rows = [_method_row(method, found, grid) for method in METHODS if method in found["methods"]]
    return markdown_table([head, *rows])


def _method_row(method: Method, found: Mapping[str, Any], grid: Grid) -> list[str]:
    entry = found["methods"][method]
    kind = "prefix" if method in BEHIND_PREFIX else method
    served = [
        found.get("serving", {}).get(str(count), {}).get(kind) for count in grid.serving_tasks
    ]
    last = served[-1]
    return [
        NAMES[method],
        f"{entry['num_trained']:,}",
        f"{entry['num_stored']:,}",
        f"{entry['stored_bytes'] / 1e3:,.0f}",
        *(spread(entry["exact_match"].get(task, [])) for task in grid.tasks),
        spread(entry["seconds"], 0),
        spread([size / _MIB for size in entry["peak_bytes"]], 0),
        *("" if one is None else f"{one['tokens_per_second']:,.0f}" for one in served),
        "" if last is None else f"{last['task_bytes'] / 1e6:.1f}",
    ]


def tuning_table(found: Mapping[str, Any], grid: Grid) -> str:
    """Exact match in percent and loss on the held-out items at each learning rate; the chosen one has a star."""
    head = [f"{task}, {figure}" for task in grid.tune_tasks for figure in ("%", "nats a token")]
    rows = [["method", "learning rate", *head]]
    for method in METHODS:
        for rate in grid.rates[method]:
            if tried := found["tuning"].get(method, {}).get(f"{rate:g}"):
                star = " *" if (found["rates"] or {}).get(method) == rate else ""
                cells = [cell for task in grid.tune_tasks for cell in _tried_cells(tried.get(task))]
                rows.append([NAMES[method], f"{rate:g}{star}", *cells])
    return markdown_table(rows)


def _tried_cells(result: Mapping[str, Any] | None) -> tuple[str, str]:
    if result is None:
        return "", ""
    said = "diverged; best before: " if result["diverged"] else ""
    return f"{result['exact_match']:.1f}", f"{said}{result['held_out_loss']:.4f}"


def study_table(lines: Mapping[str, Mapping[str, Sequence[float]]], corner: str) -> str:
    """A row for each line of a plot, a column for each point."""
    points = list(dict.fromkeys(point for values in lines.values() for point in values))
    rows = [[corner, *points]]
    for name, values in lines.items():
        rows.append([_name(name), *(spread(values.get(point, [])) for point in points)])
    return markdown_table(rows)


def _name(line: str) -> str:
    """Methods by their names, tasks as they are."""
    return {str(method): name for method, name in NAMES.items()}.get(line, line)


def markdown(found: Mapping[str, Any], grid: Grid) -> str:
    """All tables that there are results for, each under its heading."""
    parts = []
    if found.get("methods"):
        parts += ["## Methods", readme_table(found, grid)]
    if found["tuning"]:
        parts += ["## Learning rates, by held-out items", tuning_table(found, grid)]
    if found.get("low_data"):
        parts += [
            f"## Exact match by training examples, {grid.low_data_task}, %",
            study_table(found["low_data"], "method"),
        ]
    if found.get("lengths"):
        parts += [
            "## Exact match by prefix length, direct, %",
            study_table(found["lengths"], "task"),
        ]
    return "\n\n".join(parts) + "\n"


# ---- plots -----------------------------------------------------------------------------------------


def plots(found: Mapping[str, Any], grid: Grid) -> dict[str, bytes]:
    """PNG by file name, of the studies that there are results for."""
    wanted = {
        "low_data.png": (
            found.get("low_data"),
            f"Few examples, {grid.low_data_task}",
            "training examples",
        ),
        "lengths.png": (
            found.get("lengths"),
            "Prefix lengths, direct",
            "virtual tokens",
        ),
    }
    return {
        name: png(partial(_lines, lines, title, x), 3.2, LIGHT)
        for name, (lines, title, x) in wanted.items()
        if lines
    }


def _lines(
    lines: Mapping[str, Mapping[str, Sequence[float]]],
    title: str,
    x: str,
    figure: Figure,
    theme: Theme,
) -> None:
    """A line through the means; the band reaches from the lowest seed to the highest."""
    axes = figure.subplots()
    titled(axes, title, x, "exact match, %")
    places = sorted({int(point) for values in lines.values() for point in values})
    for colour, (name, values) in zip(theme.lines, lines.items(), strict=False):
        points = sorted(values.items(), key=lambda pair: int(pair[0]))
        xs = [int(point) for point, _ in points]
        axes.plot(
            xs, [mean(v) for _, v in points], color=colour, marker="o", ms=4, label=_name(name)
        )
        lows, highs = [min(v) for _, v in points], [max(v) for _, v in points]
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
    _log_axis(axes, places)
    axes.set_ylim(-2, 102)
    legend(axes)


def _log_axis(axes: Axes, places: Sequence[int]) -> None:
    """Doublings are equally wide; a mark at each place that was measured."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [f"{place:,}" for place in places])
