"""The mark that a service leaves in its local root is no part of a model that lies there."""

import tinymodels

from pissa_core.adapters.local import LocalSource
from pissa_core.layout import read_layout
from worker.places import ID_FILE


def test_the_mark_is_left_out(tmp_path):
    folder = tinymodels.save_model("llama", tmp_path / "model", dtype="fp32")
    (folder / ID_FILE).write_text("0123456789abcdef")
    layout = read_layout(LocalSource(folder))
    assert ID_FILE in layout.left_out
    assert ID_FILE not in layout.side_files
