# SPDX-License-Identifier: Apache-2.0
"""What is legal and what it takes: ranks, layers that can be packed, bytes."""
