# SPDX-License-Identifier: Apache-2.0
"""A finished folder: what it holds, what it says of itself, whether it is still what was written."""
