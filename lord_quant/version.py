# SPDX-License-Identifier: Apache-2.0
"""The package version and the version of the checkpoint format it writes."""

__version__ = "0.1.0"

FORMAT_VERSION = 2
"""Raised whenever a checkpoint written now could not be read by an older release."""
