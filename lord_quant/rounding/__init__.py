# SPDX-License-Identifier: Apache-2.0
"""Rounding a layer and its factors: GPTQ, what it leaves to other outputs, polishing."""
