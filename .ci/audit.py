# SPDX-License-Identifier: Apache-2.0
"""Reports known vulnerabilities of the pinned packages, as pip-audit finds them. `make audit` runs this; it never fails.

    python .ci/audit.py PIP_AUDIT CONSTRAINTS

pip-audit asks PyPI, not the package index in use. What PyPI does not answer for is counted: pip-audit calls a list of
which it could look up nothing free of known vulnerabilities.
"""

from __future__ import annotations

import json
import subprocess
import sys


SECONDS = 45


def main() -> None:
    """Prints the report."""
    program, constraints = sys.argv[1:]
    command = [program, "--requirement", constraints, "--no-deps", "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--timeout", "10"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        packages = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
        print(f"nothing was audited: {type(error).__name__}: {error}")
        return
    looked_up = [package for package in packages if "skip_reason" not in package]
    for package in looked_up:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    known = sum(bool(package["vulns"]) for package in looked_up)
    print(f"{len(looked_up)} of {len(packages)} pinned packages could be looked up; {known} have known vulnerabilities")


if __name__ == "__main__":
    main()
