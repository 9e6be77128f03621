# SPDX-License-Identifier: Apache-2.0
"""A model one block at a time: from its files, forward in two streams, backward."""
