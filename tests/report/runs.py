"""A finished run's folder, written by hand with known numbers."""

import json
from pathlib import Path

SETTINGS = {
    "precision.weights.bits": 4,
    "precision.activations.bits": 4,
    "precision.kv.bits": 4,
    "transform.class_path": "bisup_lightning.transform.reorder.Atom",
    "solver.class_path": "bisup_lightning.calibrate.solvers.BiSup",
    "solver.init_args.theta.clip": True,
    "solver.init_args.theta.smoothing": "soft",
    "solver.init_args.theta.low_rank": "slrec",
    "solver.init_args.theta.rank": 32,
    "solver.init_args.epochs": 2,
    "data.calibration": "wikitext2",
    "data.num_samples": 128,
    "data.seq_len": 2048,
    "prompt.kind": "bos",
}


def results_of(settings=None, **changes):
    """The content of a results.json: two blocks, of which the second kept its start."""
    blocks = [
        {"index": 0, "loss_initial": 0.5, "loss_final": 0.25, "mse": 0.25, "relative_mse": 0.0125, "kept_start": False,
         "seconds": 100.0, "phases": {"read": 1.0, "full precision": 4.0, "solve": 95.0}},
        {"index": 1, "loss_initial": 2.0, "loss_final": 2.0, "mse": 2.0, "relative_mse": 0.03125, "kept_start": True,
         "seconds": 25.0, "phases": {"read": 0.25, "full precision": 4.75, "solve": 20.0}},
    ]  # fmt: skip
    results = {
        "checkpoint": "models/<tiny>",
        "perplexity": {
            "wikitext2": {
                "fp": 11.0,
                "fp_prompt": 10.0,
                "quantized": 12.5,
                "kl": 0.125,
                "top1": 0.75,
                "word": {"fp": 40.0, "fp_prompt": 36.0, "quantized": 49.0},
                "byte": {"fp": 1.9, "fp_prompt": 1.8, "quantized": 2.0},
            }
        },
        "zero_shot": {},
        "bytes": {"checkpoint": 3_145_728, "model": 1_048_576},
        "blocks": blocks,
        "seconds": 125.0,
        "tokens_per_second": 4194.3,
        "peak_device_bytes": 0,
        "peak_host_bytes": 734_003_200,
        "finished": "2026-01-02T03:04:05Z",
        "device": "an abacus",
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "fingerprint": SETTINGS | (settings or {}),
    }
    return results | changes


def write_run(folder: Path, results=None, analysis=None) -> Path:
    """A run_dir with results, logs of both blocks and a configuration."""
    (folder / "logs" / "00000").mkdir(parents=True)
    (folder / "logs" / "00001").mkdir()
    (folder / "results.json").write_text(json.dumps(results or results_of()))
    (folder / "logs" / "00000" / "metrics.csv").write_text("epoch,loss,step\n0,0.4,7\n1,0.3,15\n")
    (folder / "logs" / "00001" / "metrics.csv").write_text("epoch,loss,step\n0,2.2,7\n1,2.1,15\n")
    (folder / "config.yaml").write_text("checkpoint: models/<tiny>\nseed: 0\n")
    if analysis is not None:
        (folder / "analysis.json").write_text(json.dumps(analysis))
    return folder
