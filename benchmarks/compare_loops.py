"""Both training scripts on one recipe, side by side: `python -m benchmarks.compare_loops recipes/demo.json [--key value ...]`.

Each script runs `--rounds` times in a process of its own, in turn, so that a noisy machine disturbs both. Prints final
UAR with its interval, training time, clips a second and peak memory, the medians' ratio, and draws both loss curves into
`runs/compare_loops/loss_curves.png`. Training time is that of the loop with its validations, which both report alike.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
SCRIPTS = {"Trainer": "run_classification.py", "by hand": "run_classification_no_trainer.py"}
TOLERANCE = 0.03


def run(script: str, recipe_and_flags: list[str], folder: Path) -> dict[str, float]:
    """Runs one script and returns its results with `peak_memory`, in bytes of resident memory."""
    command = [sys.executable, __file__, "--child", script, *recipe_and_flags]
    command += ["--output_dir", str(folder), "--overwrite_output_dir", "--logging_steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return results | {"peak_memory": float(done.stdout.strip().splitlines()[-1].removeprefix("peak_memory "))}


def run_child(script: str, argv: list[str]) -> None:
    """Runs a script in this process and prints the most memory that it held, in bytes."""
    sys.path.insert(0, str(ROOT))
    module = __import__(script.removesuffix(".py"))
    module.main(argv)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("peak_memory", kilobytes * (1 if sys.platform == "darwin" else 1024))


def draw(folders: dict[str, Path], path: Path) -> float:
    """Draws both loss curves and returns the largest difference of a step's loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {name: pd.read_csv(folder / "history.csv").dropna(subset=["loss"]).set_index("step")["loss"]
              for name, folder in folders.items()}  # fmt: skip
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for (name, curve), style in zip(curves.items(), ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1.2}), strict=True):
        axes.plot(curve.index, curve.values, label=name, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    first, second = curves.values()
    return float((first - second).abs().max())


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the comparison and prints its table; returns the ratios by hand / Trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each script")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "compare_loops", help="where the runs go")
    arguments, recipe_and_flags = parser.parse_known_args(argv)
    if not recipe_and_flags:
        parser.error("name a recipe, as in recipes/demo.json")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folders = {name: arguments.folder / name.replace(" ", "_") for name in SCRIPTS}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in SCRIPTS}
    for round_number in range(arguments.rounds):
        # Who goes first alternates: the first finds the disk cache colder, the second the processor hotter.
        order = list(SCRIPTS) if round_number % 2 == 0 else list(SCRIPTS)[::-1]
        for name in order:
            measured[name].append(run(SCRIPTS[name], recipe_and_flags, folders[name]))
    print(f"{'':10} {'test UAR':>9} {'95 % interval':>16} {'training s':>11} {'clips/s':>8} {'peak memory':>12}")
    medians = {}
    for name, results in measured.items():
        median = {key: statistics.median(result[key] for result in results)
                  for key in ("train_runtime", "train_samples_per_second", "peak_memory")}  # fmt: skip
        medians[name] = median
        low, high = results[0]["test_uar_ci95"]
        print(
            f"{name:10} {results[0]['test_uar']:9.3f} {f'{low:.3f} to {high:.3f}':>16} {median['train_runtime']:11.1f} "
            f"{median['train_samples_per_second']:8.1f} {median['peak_memory'] / 2**20:9.0f} MiB"
        )
    pairs = zip(measured["by hand"], measured["Trainer"], strict=True)
    ratio = statistics.median(hand["train_runtime"] / trainer["train_runtime"] for hand, trainer in pairs)
    difference = draw(folders, arguments.folder / "loss_curves.png")
    verdict = "as fast" if abs(ratio - 1) <= TOLERANCE else "slower" if ratio > 1 else "faster"
    print(f"By hand takes {ratio:.3f} of Trainer's time (median of {arguments.rounds}): {verdict}, to within {TOLERANCE:.0%}.")
    print(f"Largest difference of a step's loss: {difference:.2e}. Curves: {arguments.folder / 'loss_curves.png'}")
    return {"time_ratio": ratio, "largest_loss_difference": difference}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], sys.argv[3:])
    else:
        main()
