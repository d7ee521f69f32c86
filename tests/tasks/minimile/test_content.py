"""The default set is the same everywhere: a hash over pixels and words."""

from __future__ import annotations

import hashlib
import json

from kvbench.tasks.minimile import FOLDERS, INSTRUCTIONS, VERSION, draw, sample_rng

SHA256 = {1: "83ca27a290c5b5ee5ec016834154ebb05ead36fde749d26058640190e3022abd"}


def test_the_first_samples_of_every_task_never_change_within_a_version():
    digest = hashlib.sha256()
    for folder in FOLDERS:
        digest.update(json.dumps(INSTRUCTIONS[folder]).encode())
        for index in range(5):
            drawing = draw(folder, sample_rng("test", folder, 0, index))
            words = [drawing.context, drawing.choices, drawing.answer]
            digest.update(json.dumps(words).encode())
            for image in drawing.images:
                digest.update(image.tobytes())
    assert digest.hexdigest() == SHA256[VERSION]
