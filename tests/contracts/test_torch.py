# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about torch beside tensors: that it calls plugins when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points


def test_entry_points_for_backends_are_called_at_import() -> None:
    """lord_quant/integrations/autoload.py is one, and so knows when transformers is imported."""
    (own,) = [point for point in entry_points(group="torch.backends") if point.name == "lord_quant"]
    module = own.value.partition(":")[0]
    assert module == "lord_quant.integrations.autoload"
    code = f"import sys, torch; sys.exit({module!r} not in sys.modules)"
    variables = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr
