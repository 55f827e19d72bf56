"""HeadRouter on the bundled two-stream model of emoji: edits with heads routed, text blended, both and neither."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accel_tools.measure.stable_flow import TASK, pairs, scored
from methods import headrouter


def study(folder: Path) -> dict[str, Any]:
    """Edits under the parts of the method; the model has no single blocks, so that image tokens are not gated."""
    pipe, asked, whole = TASK.load(), pairs(), headrouter.Config()
    rows = []
    for name, config in (("no part", headrouter.OFF), ("heads routed", replace(whole, blend=0.0)),
                         ("text blended", replace(whole, gamma=0.0)), ("both", whole)):
        with headrouter.apply(pipe, config):
            rows.append([name, *scored(pipe, asked)])
    return {"model": TASK.model, "title": "Edits beside a source",
            "note": f"{len(asked)} pairs of prompts such as \"{asked[0][0]}\" and \"{asked[0][1]}\", {TASK.steps} steps, both "
                    "pictures from one noise and none inverted. Right: the edit is nearer to the emoji asked for than to that "
                    "of the source, in the features of a judge; like the source: cosine of both pictures there; moved: mean "
                    "difference of their pixels in [0, 1].",
            "columns": ["With", "Right", "Like the source", "Moved"], "rows": rows}
