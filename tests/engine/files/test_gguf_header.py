"""Headers of GGUF files that claim what is not there: refused before anything is made of it, and good ones are read."""
from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
if sys.platform == "win32":
    pytest.skip("pipes and devices among files", allow_module_level=True)

from engine.core import UserError  # noqa: E402
from engine.files.gguf.header import MOST_WORDS, read_header  # noqa: E402
from tests.support import absurd_folders  # noqa: E402
from tests.support.gguf_files import finish  # noqa: E402

HARMLESS = {"gguf alignment huge", "gguf long name"}  # what is wrong with them is not the header


@pytest.mark.parametrize("name, damage", [each for each in absurd_folders.gguf_files() if each[0] not in HARMLESS])
def test_a_header_that_lies_is_refused_and_takes_no_memory(tmp_path, name, damage):
    damage(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read_header(tmp_path / "model.gguf")
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_good_header_is_read_past_its_vocabulary(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_token_list([f"w{i}" for i in range(1000)])
    writer.add_bool("a.yes", True)
    writer.add_float32("a.half", 0.5)
    writer.add_string("a.text", "ä")
    writer.add_tensor("one.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    finish(writer)
    header = read_header(tmp_path / "m.gguf")
    assert header.fields == {"general.architecture": "qwen3moe", "a.yes": True, "a.half": 0.5, "a.text": "ä"}
    one, two = header.tensors
    assert (one.name, one.kind, one.shape, one.data.tolist()) == ("one.weight", "F32", (3, 2), [[0, 1, 2], [3, 4, 5]])
    assert (two.kind, two.data.dtype, two.data.tolist()) == ("F16", np.float16, [0, 1, 2, 3, 4])
    assert MOST_WORDS > 8 * 260_000  # a large vocabulary and twice as many merges, with room
