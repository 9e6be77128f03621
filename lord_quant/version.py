# SPDX-License-Identifier: Apache-2.0
"""The package version and the version of the checkpoint format it writes."""

__version__ = "0.1.0"

FORMAT_VERSION = 6
"""The newest version read, and that of checkpoints with column-pivoted layers. Raised whenever a checkpoint written now
could not be read by an older release."""

FACTOR_FORMAT_VERSION = 5
"""That of other packed checkpoints in which a factor has a group size of its own."""

PART_FORMAT_VERSION = 4
"""That of other packed checkpoints some layers of which are not packed."""

MIXED_FORMAT_VERSION = 3
"""That of other checkpoints whose layers are grouped or differ in bits or group size."""

UNIFORM_FORMAT_VERSION = 2
"""That of all other checkpoints, which releases before 3 read as well."""
