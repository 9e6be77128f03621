# SPDX-License-Identifier: Apache-2.0
"""What is read and written, file by file: strict readers, headers, places of tensors, claims."""
