"""The figures of many runs in one small file, to be carried from one machine to another."""

import tarfile
from pathlib import Path

from bisup_lightning.files import replacing
from bisup_lightning.run_layout import ANALYSIS, CONFIG, EPOCH_LOGS, RESULTS

FIGURES = (CONFIG, EPOCH_LOGS, ANALYSIS, RESULTS)  # what a run is read from; the results come last


def pack(runs: Path, archive: Path) -> None:
    """Write an archive (.tar.gz) of the figures of every finished run below `runs`, by the name of its folder."""
    with replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for results in sorted(runs.glob(f"*/{RESULTS}")):
            for pattern in FIGURES:
                for path in sorted(results.parent.glob(pattern)):
                    tar.add(path, path.relative_to(runs))


def unpack(archive: Path, runs: Path) -> list[str]:
    """Lay the runs of an archive below `runs`, but for those that are finished there.

    Returns:
        Names of the runs that were new.

    Raises:
        tarfile.TarError: If the archive is damaged, or would write elsewhere.
    """
    finished = {path.parent.name for path in runs.glob(f"*/{RESULTS}")}
    with tarfile.open(archive, "r:gz") as tar:
        new = [member for member in tar.getmembers() if Path(member.name).parts[0] not in finished]
        tar.extractall(runs, new, filter="data")
    return sorted({Path(member.name).parts[0] for member in new})
