# SPDX-License-Identifier: Apache-2.0
"""From a budget to a plan: the menu, the choice, plan files."""
