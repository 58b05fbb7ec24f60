"""Whether the forward-backward error tells where flow is wrong: sparsification on real pairs with ground truth.

    python -m benchmarks.bench_confidence --data_root ~/datasets --models raft-small.pth --plot confidence.png

The pixels of each pair are dropped from the least sure on, 5 % at a time, and the end-point error of what remains is
compared with that of dropping the pixels of the largest true error (ideal), and any pixels (random). AUSE is the area
between curve and ideal, as a share of the error of all pixels, averaged over pairs (Ilg et al. 2018, Uncertainty
estimates and multi-hypotheses networks for optical flow): 0 is ideal.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.real_pairs import make_parser, open_all, save_results
from flow_inference import consistency_error, predict_pair

DROPPED = np.arange(0, 1, 0.05)  # shares of the pixels


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--plot", type=Path, help="PNG of the curves; needs matplotlib")
    args = parser.parse_args(argv)
    models, pairs = open_all(args, "benchmarks.bench_confidence")
    results = {
        name: summarize([sparsify(*errors_of(model, *pair, args.num_flow_updates)) for pair in pairs])
        for name, model in models.items()
    }
    print(as_table(results))
    if args.plot is not None:
        plot(results, args.plot)
    save_results(args, len(pairs), results)


def errors_of(model: Any, sample: Any, padding: str, num_flow_updates: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the end-point error and the forward-backward error of the pixels with known flow, both `(N,)`."""
    flow, backward = (
        predict_pair(model, *images, num_flow_updates, padding)[None]
        for images in ((sample.image1, sample.image2), (sample.image2, sample.image1))
    )
    unsure = consistency_error(flow, backward)[0].numpy()
    error = np.linalg.norm(flow[0].permute(1, 2, 0).numpy() - sample.flow, axis=-1)
    return error[sample.valid].astype(np.float64), unsure[sample.valid]


def sparsify(error: np.ndarray, unsure: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean error of what remains after each share of `DROPPED`, by the estimate and by the true error.

    Args:
        error: `(N,)`, pixels.
        unsure: `(N,)`, dropped from the largest value on.
    """
    counts = np.maximum(1, np.round(len(error) * (1 - DROPPED)).astype(int))
    return {
        kind: np.cumsum(error[np.argsort(key, kind="stable")])[counts - 1] / counts
        for kind, key in (("by confidence", unsure), ("ideal", error))
    }


def summarize(curves: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Return mean curves, each pair's as a share of its own error, and the areas above the ideal one."""
    shares = {
        kind: np.mean([curve[kind] / curve["ideal"][0] for curve in curves], axis=0)
        for kind in ("by confidence", "ideal")
    }
    shares["random"] = np.ones_like(DROPPED)
    areas = {kind: float(np.trapezoid(share - shares["ideal"], DROPPED)) for kind, share in shares.items()}
    epe = float(np.mean([curve["ideal"][0] for curve in curves]))
    return {"pairs": len(curves), "epe": epe, "ause": areas["by confidence"], "ause_random": areas["random"]} | {
        "dropped": DROPPED.tolist(),
        "curves": {kind: share.tolist() for kind, share in shares.items()},
    }


def as_table(results: dict[str, Any]) -> str:
    """Return Markdown: a row for each model."""
    lines = ["| | pairs | EPE, px | without the least sure 10 % | 25 % | 50 % | AUSE | of random order |"]
    lines.append("|---" * 8 + "|")
    for name, result in results.items():
        curve = result["curves"]["by confidence"]
        left = [f"{100 * curve[int(np.argmin(np.abs(DROPPED - share)))]:.0f} %" for share in (0.1, 0.25, 0.5)]
        row = [Path(name).stem, str(result["pairs"]), f"{result['epe']:.2f}", *left]
        lines.append(f"| {' | '.join(row)} | {result['ause']:.3f} | {result['ause_random']:.3f} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the curves of each model beside each other."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 3.4), squeeze=False, sharey=True)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for (kind, curve), style in zip(result["curves"].items(), ("-", "--", ":"), strict=True):
            axis.plot(100 * DROPPED, 100 * np.asarray(curve), style, label=kind)
        axis.set(title=f"{Path(name).stem}: AUSE {result['ause']:.3f}", xlabel="pixels dropped, %", ylim=(0, 125))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("end-point error of the rest, % of all")
    axes[0][0].legend(loc="upper center", ncol=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
