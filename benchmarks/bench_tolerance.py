"""What `--tolerance` saves and costs: updates used and end-point error of real pairs with ground truth.

    python -m benchmarks.bench_tolerance --data_root ~/datasets --models raft-small.pth

Each pair is estimated from zero flow with each tolerance, and without one.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_pairs import make_parser, open_all, save_results
from flow_inference.estimator import FlowEstimator

TOLERANCES = (None, 0.02, 0.05, 0.1, 0.2, 0.5)  # pixels


def main(argv: list[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    models, pairs = open_all(args, "benchmarks.bench_tolerance")
    results: dict[str, Any] = {}
    for name, model in models.items():
        measured = np.array([measure(model, pair.sample, args.num_flow_updates) for pair in pairs])  # (pairs, T, 2)
        results[name] = {
            str(tolerance): {"updates": float(updates), "epe": float(epe), "least": int(least), "most": int(most)}
            for tolerance, (updates, epe), least, most in zip(
                TOLERANCES,
                measured.mean(0),
                measured[..., 0].min(0),
                measured[..., 0].max(0),
                strict=True,
            )
        }
    print(as_table(results, len(pairs)))
    save_results(args, len(pairs), results)


def measure(model: Any, sample: Any, num_flow_updates: int) -> list[tuple[float, float]]:
    """Return updates used and end-point error in pixels for each tolerance."""
    estimator = FlowEstimator(model, *sample.image1.shape[:2])
    pair = tuple(estimator.encode_all([sample.image1, sample.image2]))
    results: list[tuple[float, float]] = []
    for tolerance in TOLERANCES:
        estimate = estimator.estimate_until([pair], num_flow_updates, None, tolerance)  # type: ignore[list-item]
        error = np.linalg.norm(estimate.flow[0].permute(1, 2, 0).numpy() - sample.flow, axis=-1)
        results.append((estimate.num_flow_updates[0], float(error[sample.valid].mean())))
    return results


def as_table(results: dict[str, Any], num_pairs: int) -> str:
    """Return Markdown: a row for each tolerance, mean updates and EPE of each model."""
    names = [Path(name).stem for name in results]
    lines = [f"| tolerance, px ({num_pairs} pairs) | " + " | ".join(f"{n}: updates | EPE, px" for n in names) + " |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for tolerance in map(str, TOLERANCES):
        cells = [f"{result[tolerance]['updates']:.1f} | {result[tolerance]['epe']:.3f}" for result in results.values()]
        lines.append(f"| {'none' if tolerance == 'None' else tolerance} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
