# SPDX-License-Identifier: Apache-2.0
"""What was chosen and from what: as numbers and as pictures."""
