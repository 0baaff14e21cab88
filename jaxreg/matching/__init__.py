"""The same place in another scan, by descriptors."""
