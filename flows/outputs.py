"""A finished result of a pair -> the run's outputs."""

from __future__ import annotations

import sys

from flows.stale import put_aside
from storage.keys import digest_bytes
from storage.run import Row, RunFolder
from storage.store import Artifact, Store, write_atomic
from tasks.frame import ImageFile
from tasks.properties import read_properties, with_properties
from tasks.stage import ItemError

RESULT = "result"  # name of the last stage's output


def export(folder: RunFolder, store: Store, row: Row, artifact: Artifact) -> None:
    """Put a finished result into the run's outputs and say so in its row; another file there is moved to RUN/replaced. Raises Damaged.

    The output is the stored result with what the target's file says beside its pixels: colours, EXIF, density.
    """
    output = f"outputs/{row.id}.png"
    data = store.read_bytes(artifact, RESULT)
    try:
        properties = read_properties(ImageFile(row.target, row.target_sha256, sys.maxsize))
    except ItemError as error:
        row.status, row.stage, row.reason = "failed", "input", f"target: {error}"
        return
    data = with_properties(data, properties)
    sha256 = digest_bytes(data)
    put_aside(folder, folder.path / output, sha256)
    write_atomic(folder.path / output, data)
    row.status, row.output, row.output_size, row.output_sha256 = "done", output, len(data), sha256
    row.stage = row.reason = ""
    row.note = "; ".join(filter(None, (row.note, *properties.lost)))
