"""What Triton compiled for a card is found again by the next start."""
from __future__ import annotations

import json
import os
import subprocess
import sys

COMPILED = """
import json
import pytest
import triton
from tests.kernels.test_compile import CALLS
from tests.support import aot
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
launch, = aot.recorded(CALLS["quantize"], pytest.MonkeyPatch())
for card in {cards}:
    aot.compiled(launch, card)
print(json.dumps(hits))
"""


def test_a_second_start_compiles_nothing(repository, tmp_path):
    """What was compiled for one card stays beside what another needs: the application names the folder, Triton the
    files, by its version, the card and the kernel's text."""
    found = []
    for cards in ((86,), (86, 120), (120, 86)):
        done = subprocess.run([sys.executable, "-c", COMPILED.format(cards=cards)], cwd=repository, text=True,
                              env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    assert found == [[False], [True, False], [True, True]]
