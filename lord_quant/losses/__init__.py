# SPDX-License-Identifier: Apache-2.0
"""What every layer would lose: measured once, kept in a file."""
