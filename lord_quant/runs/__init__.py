# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a finished folder: checks, the joint stack, resuming."""
